"""Work that is shared is done once: counted in prefills, passes, tokens, ratings and bytes."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_kvguard.engine import engine as engine_module
from pytest_kvguard.engine import waves
from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.cache.base import Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.draft import DraftCache
from pytest_kvguard.engine.cache.group import Group
from pytest_kvguard.engine.cache.shared import SharedPrefixCache
from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.grid import Cell, Prompt, Stopping
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.engine.select import importances, keep, keep_all, keep_masks
from pytest_kvguard.engine.settings import Settings
from pytest_kvguard.policies import POLICIES, get_policy
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.observe import window_attention
from pytest_kvguard.policies.selectors import top_tokens
from tests.engine.grids import CONTEXT, EVERY, QUESTIONS, STOPPING, answers, cells, prompts, run
from tests.tiny import family, tokens

ONE_TOKEN = Stopping(1, frozenset(), (), STOPPING.decode)


def test_a_shared_context_is_prefilled_once_whatever_the_grid():
    check_shared_context(memory=None)


def test_a_context_that_waves_share_is_prefilled_once():
    """As little memory as can be: every prompt is a wave of its own."""
    check_shared_context(memory=1)


def check_shared_context(memory: int | None) -> None:
    small, _ = run(family("llama"), prompts(), cells("snapkv(window=4)"), memory=memory)
    many = cells(*(EVERY if memory is None else EVERY[:2]), ratios=(0.75, 0.5, 0.3))
    large, hook = run(family("llama"), prompts(), many, memory=memory)
    assert small.prefills == large.prefills == hook.prefills == 1
    apart = [Prompt(p.ids, context=0) for p in prompts()]
    assert run(family("llama"), apart, [], memory=memory)[0].prefills == len(apart)


def test_a_prompt_that_comes_again_is_not_prefilled_again():
    """Neither in the same pass of prefill nor after the trial."""
    what = [Prompt(p.ids, context=0) for p in prompts()] * 2
    engine = Engine(AttentionHook(family("llama")))
    grid = engine.run(what, cells("knorm"), STOPPING, first=5)
    assert grid.prefills == engine.hook.prefills == len(QUESTIONS)
    base, kept = answers(grid)
    assert [base[i] for i in range(4)] == [base[i] for i in range(4, 8)]
    assert [kept[i] for i in range(4)] == [kept[i] for i in range(4, 8)]


def prefilled_tokens(what: list[Prompt]) -> int:
    """Tokens that went through the model before any was written, each prompt in its own pass."""
    hook = AttentionHook(family("llama"))
    Engine(hook, settings=Settings(prefill_tokens=1)).run(what, [], ONE_TOKEN)
    return hook.tokens - sum(len(prompt.tail) for prompt in what)


def test_no_token_of_a_shared_context_is_fed_again():
    assert prefilled_tokens(prompts()) == len(CONTEXT) + sum(map(len, QUESTIONS))
    apart = [Prompt(p.ids, context=0) for p in prompts()]
    assert prefilled_tokens(apart) == sum(len(p.ids) for p in apart)


@pytest.mark.parametrize("memory", [None, 1], ids=["one wave", "many waves"])
def test_prefilling_each_question_from_its_first_token_would_be_noticed(memory, monkeypatch):
    """The counts above are taken where the model is called: an engine that shares less is found."""

    def alone(ids: tuple[int, ...], context: int = 0, slot: int = 0) -> Wanted:
        return Wanted(ids, 0, slot)

    before = answers(run(family("llama"), prompts(), [])[0])
    monkeypatch.setattr(waves, "Wanted", alone)
    assert answers(run(family("llama"), prompts(), [])[0]) == before
    with pytest.raises(AssertionError):
        check_shared_context(memory)
    with pytest.raises(AssertionError):
        test_no_token_of_a_shared_context_is_fed_again()


def test_a_prefill_of_one_cell_is_counted_as_its_own():
    narrow = cells("pyramidinfer", ratios=(0.5, 0.7))
    grid, hook = run(family("llama"), prompts(), [*narrow, *cells("knorm")])
    answers(grid)
    assert [outcome.prefills for outcome in grid.cells.values()] == [4, 4, 0]
    assert (grid.prefills, hook.prefills) == (1, 9)


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
    one, hook_one = run(family("llama"), prompts(), [Cell(policy, 0.9)])
    first = len(rated)
    many, hook_many = run(family("llama"), prompts(), [Cell(policy, r) for r in (0.9, 0.8, 0.7)])
    assert len(rated) - first == first == len(QUESTIONS) * 3
    assert one.prefills == many.prefills
    fed = [sum(o.tokens for o in grid.cells.values()) for grid in (one, many)]
    assert hook_many.tokens - hook_one.tokens <= (fed[1] - fed[0]) * 3  # padding at most


def test_keys_and_values_are_copied_when_rows_are_made_and_not_before():
    hook, room = AttentionHook(family("llama")), 8
    prompt, policy = prompts()[0], get_policy("snapkv")
    with hook.open():
        [held] = prefill(hook, [Wanted(prompt.ids)], Observe(policy.window))
    size, position = held.stack.layers[0].keys.shape[-1], held.stack.position_bytes
    states = held.states(prompt.about, prompt.protection(policy, hook.device))
    masks = keep_masks(policy, importances(policy, states), states, 0.5)
    budgets = [policy.budget(state, 0.5) for state in states]
    with Allocated(size) as allocated, torch.inference_mode():
        keep_all(held, prompt.fed)
        kept = keep(held, masks, budgets, prompt.fed)
        Group.of(Rows([kept] * 3), DraftCache)
    assert allocated.bytes == 0
    with Allocated(size) as allocated, torch.inference_mode():
        sharing = Group.of(Rows([kept] * 3), SharedPrefixCache, capacity=room)
    assert allocated.bytes == 3 * position * room  # of the prefill nothing
    with Allocated(size) as allocated, torch.inference_mode():
        alone = Group.of(Rows([kept] * 3), DenseCache, capacity=room)
    assert allocated.bytes == 3 * (kept.bytes + position * room)  # picked from where they lie, once
    for group in (sharing, alone):
        where = [cache.keys.data_ptr() for cache in group.caches.values()]
        with hook.open():  # finds room: nothing is copied again
            Batch(hook, [group], [prompt.fed] * 3).feed([[7, 8, 9]] * 3, last=1)
        assert [cache.keys.data_ptr() for cache in group.caches.values()] == where


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


def test_rows_of_many_batches_write_on_together(monkeypatch):
    calls = {"verify": 0, "write_on": 0}

    def counting(name):
        function = getattr(engine_module, name)

        def counted(*args):
            calls[name] += 1
            return function(*args)

        return counted

    grid_cells = cells("snapkv", "knorm", "adakv", ratios=(0.2, 0.3, 0.4))
    whole = answers(run(family("llama"), prompts(), grid_cells)[0])
    for name in calls:
        monkeypatch.setattr(engine_module, name, counting(name))
    split = answers(run(family("llama"), prompts(), grid_cells, memory=300_000)[0])
    assert split == whole
    assert 2 <= calls["write_on"] < calls["verify"] > 8  # of 36 rows, four or so at a time


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "gpt_oss", "llama"])
@pytest.mark.parametrize("most", [1, 20, 1000], ids=["one by one", "some", "all in a pass"])
def test_sharing_a_prefill_changes_no_number(name, most):
    """Prompts padded beside each other behind a context, against each from its first token."""
    hook, observe = AttentionHook(family(name)), Observe(window=9, sums=True)
    near = {"rtol": 1e-4, "atol": 1e-4} if name in ("gemma2", "gpt_oss") else {}
    ids = [tuple(CONTEXT + question) for question in (*QUESTIONS, tokens(20, seed=9), [])]
    with hook.open():
        whole = [prefill(hook, [Wanted(one)], observe)[0] for one in ids]
        wanted = [Wanted(one, len(CONTEXT), slot) for slot, one in enumerate(ids)]
        joined = prefill(hook, wanted, observe, most_tokens=most)
        apart = [Wanted(one, 0, slot) for slot, one in enumerate(ids)]
        padded = prefill(hook, apart, observe, most_tokens=most * 10)
    for one, *others in zip(whole, joined, padded, strict=True):
        for other in others:
            assert other.ids == one.ids
            for index, layer in one.stack.layers.items():
                for what in ("keys", "values"):
                    held = getattr(other.stack.layers[index], what)[other.slot, :, : len(one.ids)]
                    torch.testing.assert_close(held, getattr(layer, what)[0], **near)
                torch.testing.assert_close(other.queries[index], one.queries[index], **near)
            assert other.sums.keys() == one.sums.keys()
            for index, sums in one.sums.items():
                torch.testing.assert_close(other.sums[index], sums, **near)
