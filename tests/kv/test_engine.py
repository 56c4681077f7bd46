"""Promises of the engine: shared work, equal answers however work is split, nothing left behind."""

import sys
from dataclasses import astuple, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from pytest_kvguard.errors import Unsupported
from pytest_kvguard.kv import answering
from pytest_kvguard.kv.borrowing import borrowing
from pytest_kvguard.kv.compress import importances, keep, keep_all, keep_masks
from pytest_kvguard.kv.decode import Answer, Stopping, greedy
from pytest_kvguard.kv.engine import Engine
from pytest_kvguard.kv.evicting import Decoding, evicting
from pytest_kvguard.kv.grid import Cell, Grid, Prompt
from pytest_kvguard.kv.prefill import About, Observe, prefill
from pytest_kvguard.kv.quantized import quantized
from pytest_kvguard.kv.reading import reading
from pytest_kvguard.kv.rows import GROWTH, Rows, growing
from pytest_kvguard.kv.seam import Seam
from pytest_kvguard.policies import POLICIES, get_policy
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.combine import combined
from pytest_kvguard.policies.observe import window_attention
from pytest_kvguard.policies.selectors import top_tokens
from tests.tiny import FAMILIES, family, llama, tokens

CONTEXT = tokens(30)
QUESTIONS = [tokens(4 + i, seed=i + 1) for i in range(4)]
UNITS = tuple((range(start, start + 5),) for start in range(2, 27, 5))
STOPPING = Stopping(12, frozenset({5}), (), lambda ids: " ".join(map(str, ids)))


def prompts(*, ahead: bool = False) -> list[Prompt]:
    return [Prompt(tuple(CONTEXT + q), len(CONTEXT), ahead, About(UNITS)) for q in QUESTIONS]


def cells(*specs: str, ratios: tuple[float, ...] = (0.5,)) -> list[Cell]:
    return [Cell(get_policy(spec), ratio) for spec in specs for ratio in ratios]


def answers(grid: Grid) -> list[dict[int, list[int]]]:
    outcomes = [grid.baseline, *grid.cells.values()]
    assert [outcome.problem for outcome in outcomes] == [None] * len(outcomes)
    return [{i: a.tokens for i, a in sorted(o.answers.items())} for o in outcomes]


def run(model, what: list[Prompt], grid_cells: list[Cell], **settings) -> tuple[Grid, Seam]:
    seam = Seam(model)
    return Engine(seam, **settings).run(what, grid_cells, STOPPING), seam


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_baseline_is_what_the_stock_model_generates(name):
    grid, _ = run(family(name), prompts(), [])
    for index, prompt in enumerate(prompts()):
        ids = list(prompt.ids)
        with torch.inference_mode():
            while len(ids) < len(prompt.ids) + STOPPING.most and ids[-1] not in STOPPING.eos:
                ids.append(int(family(name)(torch.tensor([ids])).logits[0, -1].argmax()))
        assert grid.baseline.answers[index].tokens == ids[len(prompt.ids) :]


@pytest.mark.parametrize("ahead", [False, True], ids=["prompt", "context"])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_keeping_all_reproduces_the_baseline(name, ahead):
    grid, _ = run(family("llama"), prompts(ahead=ahead), cells(name, ratios=(1.0,)))
    base, kept = answers(grid)
    assert kept == base
    assert all(bool((held == 1).all()) for held in grid.cells[0].held)
    assert grid.cells[0].bytes_held == grid.cells[0].bytes_full


EVERY = (
    "snapkv(window=4)",
    "shotkv(window=4)",
    "h2o",
    "tova",
    "streaming_llm(sinks=2)",
    "shotkv(window=4)+h2o@0.3",
    "snapkv(window=4)+tova",
)


@pytest.mark.parametrize("ahead", [False, True], ids=["prompt", "context"])
def test_a_row_does_not_depend_on_what_it_is_decoded_with(ahead):
    together, _ = run(family("llama"), prompts(ahead=ahead), cells(*EVERY, ratios=(0.5, 0.4)))
    for index, prompt in enumerate(prompts(ahead=ahead)):
        alone, _ = run(family("llama"), [prompt], cells(*EVERY, ratios=(0.5, 0.4)))
        for one, many in zip(answers(alone), answers(together), strict=True):
            assert one[0] == many[index]


def test_memory_splits_the_work_and_not_the_answers():
    grid, _ = run(family("llama"), prompts(), cells(*EVERY))
    split, seam = run(family("llama"), prompts(), cells(*EVERY), memory=1)
    assert answers(split) == answers(grid)
    assert seam.forwards > 100  # every row on its own


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


def without_draft(cell: Cell, prompt: Prompt) -> list[int]:
    seam, answer, device = Seam(family("llama")), Answer(), torch.device("cpu")
    with seam.open():
        held = prefill(seam, prompt.ids, Observe(cell.policy.window, cell.policy.needs_sums))
        states = held.states(prompt.about, prompt.protection(cell.policy, device))
        masks = keep_masks(cell.policy, importances(cell.policy, states), states, cell.ratio)
        budgets = [cell.policy.budget(state, cell.ratio) for state in states]
        kept = keep(held, masks, budgets, prompt.fed)
        decoding = None
        if cell.decode is not None:
            length = torch.tensor([len(prompt.ids)])
            ratio = torch.tensor([cell.decode_ratio], dtype=torch.float64)
            decoding = Decoding(cell.decode, ratio, length, length, new=(99,))
        make = growing if decoding is None else evicting(decoding)
        if cell.policy.read is not None:
            pages = int(len(prompt.ids) * cell.ratio) // cell.policy.read.page
            make = reading(cell.policy.read, torch.tensor([pages]))
        if cell.policy.store is not None:
            make = quantized(cell.policy.store, decoding)
        greedy(seam, Rows([kept], make), [prompt.tail], [answer], STOPPING)
    return answer.tokens


def test_a_shared_context_is_prefilled_once_whatever_the_grid():
    small, _ = run(family("llama"), prompts(), cells("snapkv(window=4)"))
    large, _ = run(family("llama"), prompts(), cells(*EVERY, ratios=(0.75, 0.5, 0.3)))
    assert small.prefills == large.prefills == 1
    apart = [Prompt(p.ids, context=0) for p in prompts()]
    assert run(family("llama"), apart, [])[0].prefills == len(apart)


RATING = [  # a policy that narrows has a prefill of its own for every ratio
    *(name for name in POLICIES if not get_policy(name).narrows),
    "criticalkv|fair",
    "fastgen|fair",
    "adakv|boundary",
    "snapkv|reuse",
    "shotkv+h2o@0.5",
]


@pytest.mark.parametrize("spec", RATING)
def test_a_new_ratio_rates_nothing_under_any_policy(spec, monkeypatch):
    """Neither importance nor attention is computed again, whatever the selection looks at."""
    rated, policy = [], get_policy(spec)

    def counting(function):
        def counted(*args):
            rated.append(function)
            return function(*args)

        return counted

    for name, module in list(sys.modules.items()):
        if name.startswith("pytest_kvguard.policies.") and hasattr(module, "window_attention"):
            monkeypatch.setattr(module, "window_attention", counting(window_attention))
    policy = replace(policy, importance=counting(policy.importance))
    counts = []
    for ratios in ((0.75,), (0.8, 0.75, 0.7)):
        rated.clear()
        grid, _ = run(family("llama"), prompts(), [Cell(policy, ratio) for ratio in ratios])
        answers(grid)
        counts.append(len(rated))
    assert counts[0] == counts[1] > 0


def test_a_new_ratio_costs_no_prefill_and_no_rating():
    rated = []

    def importance(state):
        rated.append(state.layer)
        return -state.keys.norm(dim=-1)

    policy = Policy("counting", importance, keep_ratio, top_tokens)
    one, seam_one = run(family("llama"), prompts(), [Cell(policy, 0.9)])
    first = len(rated)
    many, seam_many = run(family("llama"), prompts(), [Cell(policy, r) for r in (0.9, 0.8, 0.7)])
    assert len(rated) - first == first == len(QUESTIONS) * 3
    assert one.prefills == many.prefills
    fed = [sum(o.tokens for o in grid.cells.values()) for grid in (one, many)]
    assert seam_many.tokens - seam_one.tokens <= (fed[1] - fed[0]) * 3  # padding at most


def test_the_full_cache_answers_a_question_once_however_often_it_is_asked():
    engine = Engine(Seam(family("llama")))
    first = engine.run(prompts(), cells("snapkv"), STOPPING)
    again = engine.run(prompts(), cells("snapkv"), STOPPING)
    assert answers(again) == answers(first)
    assert (first.baseline.forwards > 0, again.baseline.forwards) == (True, 0)
    assert again.cells[0].forwards == first.cells[0].forwards
    shorter = Stopping(3, *astuple(STOPPING)[1:])
    for changed in ((prompts(ahead=True), STOPPING), (prompts(), shorter)):
        other = engine.run(changed[0], [], changed[1])
        assert other.baseline.forwards > 0
        fresh = Engine(Seam(family("llama"))).run(changed[0], [], changed[1])
        assert answers(other) == answers(fresh)


def test_keys_and_values_are_copied_when_rows_are_made_and_not_before():
    seam = Seam(family("llama"))
    prompt, policy = prompts()[0], get_policy("snapkv")
    with seam.open():
        held = prefill(seam, prompt.ids, Observe(policy.window))
    states = held.states(prompt.about, prompt.protection(policy, seam.device))
    masks = keep_masks(policy, importances(policy, states), states, 0.5)
    budgets = [policy.budget(state, 0.5) for state in states]
    with Allocated(held.layers[0].keys.shape[-1]) as allocated, torch.inference_mode():
        keep_all(held, prompt.fed)
        kept = keep(held, masks, budgets, prompt.fed)
        Rows([kept] * 3, borrowing)
    assert allocated.bytes == 0
    with Allocated(held.layers[0].keys.shape[-1]) as allocated, torch.inference_mode():
        rows = Rows([kept] * 3)
    room = sum(layer.keys.nbytes // layer.keys.shape[1] for layer in kept.layers) * 2 * GROWTH
    assert allocated.bytes == 3 * (kept.bytes + room)  # picked from where they lie, once
    where = [layer.keys.data_ptr() for layer in rows.layers.values()]
    with seam.open():
        rows.feed(seam, [[7, 8, 9]] * 3, last=1)  # finds room: nothing is copied again
    assert [layer.keys.data_ptr() for layer in rows.layers.values()] == where


@pytest.mark.parametrize("spec", ["h2o", "h2o|int8", "tova|rerotated"])
def test_a_cell_that_keeps_all_leaves_the_eviction_of_others_alone(spec):
    policy = get_policy(spec)
    both = run(family("llama"), prompts(), [Cell(policy, 1.0), Cell(policy, 0.5)])[0]
    alone = run(family("llama"), prompts(), [Cell(policy, 0.5)])[0]
    assert both.cells[1].evicted == alone.cells[0].evicted > 0
    assert answers(both)[2] == answers(alone)[1]


def test_rows_of_many_batches_write_on_together(monkeypatch):
    calls = {"score_draft": 0, "greedy": 0}

    def counting(name):
        function = getattr(answering, name)

        def counted(*args):
            calls[name] += 1
            return function(*args)

        return counted

    grid_cells = cells("snapkv", "knorm", "adakv", ratios=(0.2, 0.3, 0.4))
    whole = answers(run(family("llama"), prompts(), grid_cells)[0])
    for name in calls:
        monkeypatch.setattr(answering, name, counting(name))
    split = answers(run(family("llama"), prompts(), grid_cells, memory=300_000)[0])
    assert split == whole
    assert 2 <= calls["greedy"] < calls["score_draft"] > 8  # of 36 rows, four or so at a time


class Allocated(TorchDispatchMode):
    """Counts the bytes of new tensors of numbers that end in the size of a head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.bytes = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]  # also what is written to
        known = {x.untyped_storage().data_ptr() for x in given if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.dim():
            new = out.untyped_storage().data_ptr() not in known
            self.bytes += out.nbytes if new and out.shape[-1] == self.size else 0
        return out


def test_sharing_a_prefill_changes_no_number():
    seam = Seam(family("gemma3"))
    ids = CONTEXT + QUESTIONS[3]
    with seam.open():
        whole = prefill(seam, ids, Observe(window=9, sums=True))
        start = prefill(seam, CONTEXT, Observe(window=9, sums=True))
        joined = prefill(seam, ids, Observe(window=9, sums=True), after=start)
    for one, two in zip(whole.layers, joined.layers, strict=True):
        for what in ("keys", "values", "queries"):
            torch.testing.assert_close(getattr(one, what), getattr(two, what))
        if one.sums is not None:
            torch.testing.assert_close(one.sums, two.sums)


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
    assert grid.baseline.bytes_full == layers * heads * (len(prompt.ids) - 1) * numbers * 4


def test_bfloat16_runs_and_keeps_its_type():
    model = llama().to(torch.bfloat16)
    grid, _ = run(model, prompts(), cells(*EVERY))
    answers(grid)
    full, _ = run(llama(), prompts()[:1], [])
    half, _ = run(model, prompts()[:1], [])
    assert half.baseline.bytes_full * 2 == full.baseline.bytes_full


def test_the_model_is_as_it_was_afterwards():
    model = llama()
    model.train()
    run(model, prompts(), cells("h2o"))
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    model.eval()
    ids = torch.tensor([CONTEXT])
    torch.testing.assert_close(model(ids).logits, llama()(ids).logits)


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


def test_a_run_can_be_given_up_after_its_first_answers():
    grid = Engine(Seam(family("llama"))).run(
        prompts(), cells("knorm"), STOPPING, first=2, go_on=lambda found: False
    )
    assert grid.abandoned
    assert sorted(grid.baseline.answers) == [0, 1]
    assert grid.cells[0].answers == {}


def test_a_model_without_attention_is_refused_by_name():
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(Unsupported, match="MambaForCausalLM"):
        run(MambaForCausalLM(config), prompts(), [])


def test_attention_that_would_not_be_reproduced_is_refused_by_name():
    config = Gemma2Config(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    with pytest.raises(Unsupported, match="softcap"):
        run(Gemma2ForCausalLM(config), prompts(), [])


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


def test_it_does_not_matter_which_attention_a_model_was_loaded_with():
    eager = llama()
    eager.set_attn_implementation("eager")
    grid, _ = run(eager, prompts(), cells(*EVERY))
    assert answers(grid) == answers(run(family("llama"), prompts(), cells(*EVERY))[0])
    assert eager.config._attn_implementation == "eager"


def test_a_model_that_answers_otherwise_when_observed_is_refused():
    """Attention that is called twice in a layer would be recorded once."""
    config = DiffLlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(Unsupported, match="DiffLlamaForCausalLM"):
        run(DiffLlamaForCausalLM(config), prompts(), [])


def test_a_decode_step_that_fails_fails_its_cell_alone():
    def importance(state):
        raise RuntimeError("late boom")

    h2o = get_policy("h2o")
    broken = replace(h2o, decode=replace(h2o.decode, importance=importance))
    grid, _ = run(family("llama"), prompts(), [Cell(broken, 0.5), *cells("knorm")])
    assert grid.cells[0].problem == (0, "RuntimeError: late boom")
    assert grid.cells[1].problem is None


def test_what_goes_while_decoding_is_counted():
    keep_prompt = get_policy("shotkv(window=4, decode_ratio=0.5)")
    grid, _ = run(family("llama"), prompts(), [Cell(keep_prompt, 1.0), *cells("knorm")])
    assert grid.cells[0].evicted > 0
    assert grid.cells[1].evicted == 0
    one_token = Stopping(1, frozenset(), (), STOPPING.decode)
    short = Engine(Seam(family("llama"))).run(prompts(), [Cell(keep_prompt, 1.0)], one_token)
    assert short.cells[0].evicted == 0


def test_a_trial_goes_on_until_it_has_enough_answers_however_small_the_waves():
    heard = []

    def go_on(found):
        heard.append(len(found))
        return True

    Engine(Seam(family("llama")), memory=1).run(prompts(), [], STOPPING, first=3, go_on=go_on)
    assert heard == [1, 2, 3]
