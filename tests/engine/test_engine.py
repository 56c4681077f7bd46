"""Promises of the engine: equal answers however work is split, nothing left behind."""

from dataclasses import astuple, replace
from functools import cache

import pytest
import torch

from pytest_kvguard.engine import engine as engine_module
from pytest_kvguard.engine.cache import evicting
from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.grid import Cell, Grid, Prompt, Stopping
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.settings import Settings
from pytest_kvguard.policies import POLICIES, get_policy
from pytest_kvguard.policies.base import EMPTY, Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.combine import combined
from pytest_kvguard.policies.selectors import top_tokens
from tests.engine.grids import (
    EVERY,
    EVERY_CACHE,
    STOPPING,
    answers,
    cells,
    compared,
    outcomes,
    prompts,
    run,
    without_draft,
)
from tests.tiny import FAMILIES, family, llama

BOTH = pytest.mark.parametrize("ahead", [False, True], ids=["prompt", "context"])


@BOTH
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_baseline_is_what_the_stock_model_generates(name, ahead):
    grid, _ = run(family(name), prompts(ahead=ahead), [])
    for index, prompt in enumerate(prompts()):
        ids = list(prompt.ids)
        with torch.inference_mode():
            while len(ids) < len(prompt.ids) + STOPPING.most and ids[-1] not in STOPPING.eos:
                ids.append(int(family(name)(torch.tensor([ids])).logits[0, -1].argmax()))
        assert grid.baseline.answers[index].tokens == ids[len(prompt.ids) :]


@BOTH
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_keeping_all_reproduces_the_baseline(name, ahead):
    grid, _ = run(family("llama"), prompts(ahead=ahead), cells(name, ratios=(1.0,)))
    base, kept = answers(grid)
    assert kept == base
    assert all(bool((held == 1).all()) for held in grid.cells[0].held)
    assert grid.cells[0].bytes_held == grid.cells[0].bytes_full
    assert grid.cells[0].bytes_padding == 0


@BOTH
def test_a_row_does_not_depend_on_what_it_is_decoded_with(ahead):
    together, _ = run(family("llama"), prompts(ahead=ahead), cells(*EVERY, ratios=(0.5, 0.4)))
    for index, prompt in enumerate(prompts(ahead=ahead)):
        alone, _ = run(family("llama"), [prompt], cells(*EVERY, ratios=(0.5, 0.4)))
        for one, many in zip(answers(alone), answers(together), strict=True):
            assert one[0] == many[index]


def test_memory_splits_the_work_and_not_the_answers():
    grid, _ = run(family("llama"), prompts(), cells(*EVERY))
    split, hook = run(family("llama"), prompts(), cells(*EVERY), memory=1)
    assert answers(split) == answers(grid)
    assert hook.forwards > 100  # every row on its own


SETTINGS = {
    "a prompt a pass": Settings(prefill_tokens=1),
    "all prompts in a pass": Settings(prefill_tokens=10**6),
    "two prompts in a pass": Settings(prefill_tokens=75),
    "no room": Settings(capacity=1, growth=1),
    "room for three": Settings(capacity=2, growth=3),
    "rows of one length": Settings(alike=1.0),
    "rows of any length": Settings(alike=0.0),
    "rows that end go at once": Settings(worth_keeping=1.0),
    "rows that end stay": Settings(worth_keeping=0.0),
    "a look every five": Settings(look_every=5),
    "a look at the end": Settings(look_every=100),
    "looks, growth and ends": Settings(1, 1, 2, 0.5, 1.0, 3),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_no_size_at_which_the_engine_decides_changes_an_answer(name, settings):
    for one, two in zip(
        outcomes(by_default(name)), outcomes(in_sizes(name, settings)), strict=True
    ):
        assert compared(two) == compared(one)
        for first, second in zip(one.held, two.held, strict=True):
            assert torch.equal(first, second)
        assert two.read == pytest.approx(one.read)


def in_sizes(name: str, settings: Settings | None) -> Grid:
    what = [*prompts()[:3], *prompts(ahead=True)[2:]]
    return run(family(name), what, cells(*EVERY_CACHE), settings=settings)[0]


@cache
def by_default(name: str) -> Grid:
    return in_sizes(name, None)


@pytest.mark.parametrize(
    "spec",
    [
        "knorm",
        "h2o",
        "shotkv(window=4)",
        "streaming_llm(sinks=2)",
        "shotkv(window=4)+tova@0.3",
        "snapkv(window=4)+scope(window=3, recent=2)",
        "adakv(window=4, floor=0.0)",
    ],
)
def test_answers_grow_beyond_the_draft_as_if_written_step_by_step(spec):
    """A row that leaves its draft ends where a row without any draft would."""
    check_without_draft(*cells(spec))


def test_a_head_that_holds_more_than_the_budget_has_room_for_what_is_generated():
    def select(importance, n, state):
        most = top_tokens(importance, min(2 * n - 1, state.length), state)
        return torch.stack([most[0], state.protected])

    lopsided = Policy("lopsided", get_policy("knorm").importance, keep_ratio, select)
    lopsided = replace(lopsided, shares_heads=True)
    check_without_draft(Cell(combined(lopsided, get_policy("h2o"), 0.75), 0.5))


def check_without_draft(rule: Cell) -> None:
    grid, _ = run(family("llama"), prompts(), [rule])
    base, kept = answers(grid)
    assert base != kept
    for index, prompt in enumerate(prompts()):
        assert kept[index] == without_draft(rule, prompt)


def test_the_full_cache_answers_a_question_once_however_often_it_is_asked():
    engine = Engine(AttentionHook(family("llama")))
    first = engine.run(prompts(), cells("snapkv"), STOPPING)
    again = engine.run(prompts(), cells("snapkv"), STOPPING)
    assert answers(again) == answers(first)
    assert (first.baseline.forwards > 0, again.baseline.forwards) == (True, 0)
    assert again.cells[0].forwards == first.cells[0].forwards
    shorter = Stopping(3, *astuple(STOPPING)[1:])
    for changed in ((prompts(ahead=True), STOPPING), (prompts(), shorter)):
        other = engine.run(changed[0], [], changed[1])
        assert other.baseline.forwards > 0
        fresh = Engine(AttentionHook(family("llama"))).run(changed[0], [], changed[1])
        assert answers(other) == answers(fresh)


@pytest.mark.parametrize("spec", ["h2o", "h2o|int8", "tova|rerotated"])
def test_a_cell_that_keeps_all_leaves_the_eviction_of_others_alone(spec):
    policy = get_policy(spec)
    both = run(family("llama"), prompts(), [Cell(policy, 1.0), Cell(policy, 0.5)])[0]
    alone = run(family("llama"), prompts(), [Cell(policy, 0.5)])[0]
    assert both.cells[1].evicted == alone.cells[0].evicted > 0
    assert answers(both)[2] == answers(alone)[1]


def test_what_is_held_stays_within_the_ratio_in_every_layer_and_head():
    ratio = 0.4
    grid, _ = run(family("llama"), prompts(), cells("shotkv(window=4)", "h2o", ratios=(ratio,)))
    for outcome in grid.cells.values():
        assert all(bool((held <= ratio).all()) for held in outcome.held)
        assert 0 < outcome.bytes_held <= ratio * outcome.bytes_full


def test_bytes_are_those_of_the_tensors():
    [prompt] = prompts()[:1]
    grid, _ = run(family("llama"), [prompt], cells("knorm"))
    budget, size = len(prompt.ids) // 2, family("llama").config.head_dim
    layers, heads, numbers = 3, 2, 2 * size
    assert grid.cells[0].bytes_held == layers * heads * (budget - 1) * numbers * 4
    assert grid.cells[0].bytes_padding == 0
    assert grid.baseline.bytes_full == layers * heads * (len(prompt.ids) - 1) * numbers * 4


def test_padding_is_counted_apart_from_what_is_held():
    """One head keeps everything, the other a third: a tensor of both pads the other."""

    def select(importance, n, state):
        mask = top_tokens(importance, n // 3, state)
        mask[0] = True
        return mask

    policy = Policy("uneven", lambda s: -s.keys.norm(dim=-1), lambda s, r: s.length, select)
    [prompt] = prompts()[:1]
    grid, _ = run(family("llama"), [prompt], [Cell(policy, 0.5)])
    token, layers, length = 2 * family("llama").config.head_dim * 4, 3, len(prompt.ids)
    few = length // 3 - 1  # the last token is fed again
    answers(grid)
    assert grid.cells[0].bytes_held == layers * token * (length - 1 + few)
    assert grid.cells[0].bytes_padding == layers * token * (length - 1 - few)


def test_a_run_can_be_given_up_after_its_first_answers():
    grid = Engine(AttentionHook(family("llama"))).run(
        prompts(), cells("knorm"), STOPPING, first=2, look=lambda found: 0
    )
    assert grid.abandoned
    assert sorted(grid.baseline.answers) == [0, 1]
    assert grid.cells[0].answers == {}


@pytest.mark.parametrize("memory", [1, 2**30])
def test_answers_are_looked_at_when_asked_for_however_small_the_waves(memory):
    heard = []

    def look(found):
        heard.append(sorted(found))
        return 1 if len(heard) == 1 else 2

    engine = Engine(AttentionHook(family("llama")), memory=memory)
    grid = engine.run(prompts(), [], STOPPING, first=1, look=look)
    assert len(grid.baseline.answers) == len(prompts())
    assert heard == [[0], [0, 1], [0, 1, 2, 3]]
    assert not grid.abandoned


def test_a_later_look_can_end_a_run_too():
    look = iter([1, 0]).__next__
    engine = Engine(AttentionHook(family("llama")))
    grid = engine.run(prompts(), cells("knorm"), STOPPING, first=2, look=lambda found: look())
    assert grid.abandoned
    assert len(grid.baseline.answers) == 3
    assert grid.cells[0].answers == {}


def test_fidelity_is_perfect_without_eviction_and_not_with_it():
    grid, _ = run(family("llama"), prompts(), cells("random_tokens", ratios=(1.0, 0.3)))
    whole, part = (list(outcome.answers.values()) for outcome in grid.cells.values())
    assert all(answer.agreement == 1 and answer.kl < 1e-6 for answer in whole)
    assert all(answer.kl > 0.01 for answer in part)


def test_stop_strings_end_an_answer_and_are_left_out():
    stopping = Stopping(12, frozenset({5}), ("stop",), lambda ids: "".join(map(chr, ids)))
    asked = [ord(c) for c in "go on stop it"]
    ended = [stopping.ended(asked[: n + 1]) for n in range(len(asked))]
    assert ended.index(True) == len("go on stop") - 1
    assert stopping.text([*asked, 5]) == "go on "
    assert stopping.text([ord("a"), 5]) == "a"
    assert stopping.over([7] * 12)
    assert not stopping.ended([7] * 12)


def test_keeping_the_last_token_alone_is_seen_in_the_very_first_answer_token():
    """Where the first token came from the uncompressed prefill, one-letter answers never fail."""

    def select(importance, n, state):
        return state.protected.expand(state.keys.shape[0], -1).clone()

    policy = Policy("amnesia", lambda state: -state.keys.norm(dim=-1), keep_ratio, select)
    grid, _ = run(family("llama"), prompts(), [Cell(policy, 0.5)])
    base, kept = answers(grid)
    assert [kept[i][0] for i in kept] != [base[i][0] for i in base]
    blind, _ = run(family("llama"), [Prompt(prompts()[0].ids[-1:], context=0)], [])
    assert len(blind.baseline.answers) == 1  # even a prompt of one token is answered


def test_what_goes_while_decoding_is_counted():
    keep_prompt = get_policy("shotkv(window=4, decode_ratio=0.5)")
    grid, _ = run(family("llama"), prompts(), [Cell(keep_prompt, 1.0), *cells("knorm")])
    assert grid.cells[0].evicted > 0
    assert grid.cells[1].evicted == 0
    one_token = Stopping(1, frozenset(), (), STOPPING.decode)
    hook = AttentionHook(family("llama"))
    short = Engine(hook).run(prompts(), [Cell(keep_prompt, 1.0)], one_token)
    assert short.cells[0].evicted == 0


@pytest.mark.parametrize("spec", ["h2o", "tova", "h2o|int8"])
def test_every_slot_that_reading_the_drafts_frees_is_counted(spec, monkeypatch):
    freed, reading = [], []
    victims, verify = evicting.victims, engine_module.verify

    def watching(eviction, state):
        slots = victims(eviction, state)
        real = state.newest != EMPTY  # padding frees nothing
        freed.append(int((slots[real] != EMPTY).sum()) if reading else 0)
        return slots

    def noted(*args):
        reading.append(args)
        rows = verify(*args)
        reading.clear()
        return rows

    monkeypatch.setattr(evicting, "victims", watching)
    monkeypatch.setattr(engine_module, "verify", noted)
    grid, _ = run(family("llama"), prompts(), cells(spec))
    answers(grid)
    assert grid.cells[0].evicted == sum(freed) > len(prompts())


def test_it_does_not_matter_which_attention_a_model_was_loaded_with():
    eager = llama()
    eager.set_attn_implementation("eager")
    grid, _ = run(eager, prompts(), cells(*EVERY))
    assert answers(grid) == answers(run(family("llama"), prompts(), cells(*EVERY))[0])
    assert eager.config._attn_implementation == "eager"
