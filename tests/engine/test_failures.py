"""What fails, fails alone: a cell's code, or what memory does not hold."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from pytest_kvguard.engine import engine as engine_module
from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.grid import Cell, Grid
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.settings import Settings
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.selectors import top_tokens
from tests.engine.grids import (
    EVERY_CACHE,
    QUESTIONS,
    STOPPING,
    answers,
    cells,
    compared,
    outcomes,
    prompts,
    run,
)
from tests.tiny import family


def test_a_policy_that_fails_fails_its_cell_alone():
    def importance(state):
        raise RuntimeError("boom")

    broken = Cell(Policy("broken", importance, keep_ratio, top_tokens), 0.5)
    grid, _ = run(family("llama"), prompts(), [broken, *cells("knorm")])
    assert grid.cells[0].problem == (0, "RuntimeError: boom")
    assert len(grid.cells[1].answers) == len(QUESTIONS)


@pytest.mark.parametrize("what", ["empty", "oversize"])
def test_a_mask_that_breaks_the_contract_is_named(what):
    def select(importance, n, state):
        return torch.full(importance.shape, what == "oversize")

    cell = Cell(Policy("odd", lambda s: -s.keys.norm(dim=-1), keep_ratio, select), 0.5)
    grid, _ = run(family("llama"), prompts(), [cell])
    index, why = grid.cells[0].problem
    assert index == 0
    assert "odd" in why
    assert "layer 0" in why


def broken_decode(fault: Callable[[], Exception]) -> Cell:
    def importance(state):
        raise fault()

    h2o = get_policy("h2o")
    return Cell(replace(h2o, decode=replace(h2o.decode, importance=importance)), 0.5)


def test_a_decode_step_that_fails_fails_its_cell_alone():
    broken = broken_decode(lambda: RuntimeError("late boom"))
    grid, _ = run(family("llama"), prompts(), [broken, *cells("knorm")])
    assert grid.cells[0].problem == (0, "RuntimeError: late boom")
    assert grid.cells[1].problem is None


def test_a_decode_step_that_fails_after_the_draft_fails_its_cell_alone(monkeypatch):
    """While rows of other cells write on beside it."""
    h2o, writing = get_policy("h2o"), []
    write_on = engine_module.write_on

    def noted(*args):
        writing.append(args)
        return write_on(*args)

    def importance(state):
        if writing:
            raise RuntimeError("later boom")
        return h2o.decode.importance(state)

    monkeypatch.setattr(engine_module, "write_on", noted)
    late = Cell(replace(h2o, decode=replace(h2o.decode, importance=importance)), 0.5)
    others = cells("knorm", "tova", "h2o")
    alone = run(family("llama"), prompts(), others)[0]
    writing.clear()
    grid, _ = run(family("llama"), prompts(), [late, *others])
    assert writing
    assert grid.cells[0].problem[1] == "RuntimeError: later boom"
    for at, outcome in alone.cells.items():
        assert len(outcome.answers) == len(QUESTIONS)
        assert compared(grid.cells[at + 1]) == compared(outcome)


class Broken:
    """A codec that fails when it has been asked a number of times."""

    span = 1

    def __init__(self, times: int) -> None:
        self.left = times

    def encode(self, tokens):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("no codes")
        return (tokens,)

    def decode(self, parts, dtype):
        return parts[0]


@pytest.mark.parametrize("times", [0, 3, 4, 7], ids=lambda n: f"after {n}")
@pytest.mark.parametrize("spec", ["knorm|int8", "h2o|int8"])
def test_a_codec_that_fails_fails_its_cell_alone(spec, times):
    """When rows are made, when their bytes are counted, or when a token comes."""
    policy = get_policy(spec)
    policy = replace(policy, store=replace(policy.store, keys=Broken(times)))
    others = cells(spec, "knorm")
    plain, _ = run(family("llama"), prompts(), others)
    grid, _ = run(family("llama"), prompts(), [Cell(policy, 0.5), *others])
    assert grid.cells[0].problem == (0, "RuntimeError: no codes")
    for at, outcome in plain.cells.items():
        assert compared(grid.cells[at + 1]) == compared(outcome)


@pytest.mark.parametrize("part", ["slots", "stays"])
def test_a_policy_that_fails_when_its_rows_are_made_fails_its_cell_alone(part):
    def fails(*_):
        raise RuntimeError("no rows")

    h2o = get_policy("h2o")
    made = {
        "slots": replace(h2o, decode=replace(h2o.decode, slots=fails)),
        "stays": replace(h2o, stays=fails),
    }
    grid, _ = run(family("llama"), prompts(), [Cell(made[part], 0.5), *cells("h2o", "knorm")])
    assert grid.cells[0].problem == (0, "RuntimeError: no rows")
    assert [len(grid.cells[at].answers) for at in (1, 2)] == [len(QUESTIONS)] * 2


class Tight(AttentionHook):
    """A model whose passes run out of memory above some rows."""

    def __init__(self, model, most: int) -> None:
        super().__init__(model)
        self.most, self.refused = most, 0

    def call(self, ids, *rest, **settings):
        if len(ids) > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError(f"{len(ids)} rows")
        return super().call(ids, *rest, **settings)


SIZES = Settings(prefill_tokens=10**6)  # all prompts in a pass, if memory allows


WHAT = [*prompts()[:3], *prompts(ahead=True)[2:]]


@cache
def with_room(name: str) -> Grid:
    return run(family(name), WHAT, cells(*EVERY_CACHE), settings=SIZES)[0]


@pytest.mark.parametrize(("name", "most"), [("llama", 1), ("llama", 4), ("gemma3", 2)])
def test_out_of_memory_halves_the_batch_and_no_answer_changes(name, most):
    hook = Tight(family(name), most)
    grid = Engine(hook, settings=SIZES).run(WHAT, cells(*EVERY_CACHE), STOPPING)
    assert hook.refused > 3  # in prefills, answers, drafts and rows that write on
    check_equal(grid, with_room(name))
    assert grid.prefills == with_room(name).prefills


def check_equal(grid: Grid, plain: Grid) -> None:
    assert answers(grid) == answers(plain)
    for one, two in zip(outcomes(plain), outcomes(grid), strict=True):
        assert compared(two) == compared(one)
        assert two.tokens == one.tokens
        assert two.read == pytest.approx(one.read)
        assert [h.tolist() for h in two.held] == [h.tolist() for h in one.held]


def test_out_of_memory_while_rows_write_on_is_answered_in_the_same_way():
    """Of what the first attempt wrote, nothing is left."""

    class Late(Tight):
        def call(self, ids, *rest, **settings):
            if ids.shape[1] > 1:  # prefills, drafts and first tokens have room
                return AttentionHook.call(self, ids, *rest, **settings)
            return super().call(ids, *rest, **settings)

    hook = Late(family("llama"), 5)
    grid = Engine(hook).run(WHAT, cells(*EVERY_CACHE), STOPPING)
    assert hook.refused > 0
    check_equal(grid, with_room("llama"))


def test_a_row_that_memory_does_not_hold_fails_only_its_cell():
    broken = broken_decode(lambda: torch.OutOfMemoryError("too much"))
    others = cells("knorm", "tova", "h2o", "adakv(window=4)", "knorm|int8")
    plain, _ = run(family("llama"), prompts(), others)
    grid, _ = run(family("llama"), prompts(), [*others[:2], broken, *others[2:]])
    assert grid.cells[2].problem == (0, "OutOfMemoryError: too much")
    assert grid.cells[2].answers == {}
    for at, outcome in plain.cells.items():
        assert compared(grid.cells[at + (at >= 2)]) == compared(outcome)


def test_out_of_memory_in_the_code_of_a_policy_is_not_its_fault():
    """Its rows are halved like all others."""
    h2o, sizes = get_policy("h2o"), []

    def importance(state):
        sizes.append(len(state.positions))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("too many")
        return h2o.decode.importance(state)

    short = Cell(replace(h2o, decode=replace(h2o.decode, importance=importance)), 0.5)
    plain, _ = run(family("llama"), prompts(), cells("h2o", "knorm"))
    grid, _ = run(family("llama"), prompts(), [short, *cells("knorm")])
    assert max(sizes) > 2
    check_equal(grid, plain)


def test_what_no_row_at_all_has_memory_for_is_said():
    hook = Tight(family("llama"), 0)
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        Engine(hook).run(prompts(), cells("knorm"), STOPPING)
    assert family("llama").config._attn_implementation == "sdpa"
