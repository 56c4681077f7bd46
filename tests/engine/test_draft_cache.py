"""Rows that read a draft, and go on: what is copied, when, and who may share a prefill."""

import gc
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.cache import draft as module
from pytest_kvguard.engine.cache.base import Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.draft import DraftCache
from pytest_kvguard.engine.cache.group import Group
from pytest_kvguard.engine.cache.shared import SharedPrefixCache
from pytest_kvguard.engine.grid import Cell, Prompt
from pytest_kvguard.engine.groups import by_length, draft_groups, generation_groups, worth_sharing
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.engine.requests import Draft, HeldPrompt, Request
from pytest_kvguard.engine.select import Kept, importances, keep, keep_all, keep_masks
from pytest_kvguard.engine.settings import Settings
from pytest_kvguard.engine.stack import Prefill
from pytest_kvguard.policies import get_policy
from tests.engine.stock import FED, PROMPT, steps, stock_logits_of
from tests.tiny import family, llama, tokens

LENGTH = 60
ALIKE = Settings().alike


def read(hook: AttentionHook, *texts: list[int]) -> list[Prefill]:
    """Prefill texts into one stack."""
    with hook.open():
        return prefill(hook, [Wanted(tuple(t), slot=i) for i, t in enumerate(texts)], Observe())


def kept_shares(held: Prefill, *shares: float) -> list[Kept]:
    """The first share of the positions, for each share."""
    layers = held.stack.compressible
    out = []
    for share in shares:
        mask = torch.zeros(layers[0].keys.shape[1], LENGTH, dtype=torch.bool)
        mask[:, : int(share * LENGTH)] = True
        out.append(keep(held, [mask] * len(layers), [LENGTH] * len(layers), LENGTH))
    return out


def requests_of(kept: Sequence[Kept]) -> list[Request]:
    """Requests of as many cells; the prompts begin with what their prefill holds."""
    draft, cell = Draft([7], torch.zeros(1, 1)), Cell(get_policy("knorm"), 0.5)
    return [
        Request(HeldPrompt(0, Prompt((*k.prefill.ids, 7), 0), k.prefill), draft, i, cell, k)
        for i, k in enumerate(kept)
    ]


def batch_of(hook: AttentionHook, groups: list[tuple[Group, list[int]]], start: int) -> Batch:
    """Put groups together; all rows go on at the same position."""
    count = sum(len(same) for _, same in groups)
    return Batch(hook, [group for group, _ in groups], [start] * count)


@pytest.mark.parametrize("spec", ["snapkv(window=5)", "adakv(window=5)", "observed_attention"])
@pytest.mark.parametrize("ratios", [(0.5,), (0.25, 0.5, 0.75), (0.8, 1.0)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "gpt_oss"])
def test_rows_of_one_prefill_see_what_each_keeps_and_nothing_else(name, ratios, spec):
    """One that goes on by itself copies what it keeps, several look at the prefill together."""
    model = family(name)
    hook, policy = AttentionHook(model), get_policy(spec)
    prompt = Prompt(tuple(PROMPT), context=0)
    with hook.open():
        observe = Observe(policy.window, policy.needs_sums)
        [held] = prefill(hook, [Wanted(prompt.ids)], observe)
        states = held.states(prompt.about, prompt.protection(policy, torch.device("cpu")))
        rated = importances(policy, states)
        masks = [keep_masks(policy, rated, states, ratio) for ratio in ratios]
        budgets = [[policy.budget(state, ratio) for state in states] for ratio in ratios]
        kept = [keep(held, *row, prompt.fed) for row in zip(masks, budgets, strict=True)]
        requests = requests_of(kept)
        groups = draft_groups(requests, 4, ALIKE)
        order = [index for _, same in groups for index in same]
        batch = batch_of(hook, groups, prompt.fed)
        first = batch.feed([FED[:4]] * len(kept), last=4)
        new = {row: batch.fed(at, 4, agreed=2) for at, row in enumerate(order)}
        first = first[[order.index(row) for row in range(len(kept))]]
        groups = generation_groups(requests, 4, len(FED), ALIKE)  # grows when that is full
        for group, same in groups:
            group.begin([new[row] for row in same], [prompt.fed] * len(same))
        caches = [cache for group, _ in groups for cache in group.caches.values()]
        assert any(isinstance(c, SharedPrefixCache) for c in caches) == (sum(ratios) > 1)
        order = [index for _, same in groups for index in same]
        batch = batch_of(hook, groups, prompt.fed + 2)
        later = torch.stack(steps(batch, [FED[2:6]] * len(kept)), dim=1)  # (R, 4, V)
        later = later[[order.index(row) for row in range(len(kept))]]
        batch.take([order.index(len(kept) - 1)])
        alone = torch.cat(steps(batch, [FED[6:]]))
    for row, chosen in enumerate(masks):
        own = torch.cat([first[row, :2], later[row]])
        if row == len(kept) - 1:
            own = torch.cat([own, alone])
        expected = stock_logits_of(chosen, held, model)[: len(own)]
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)


def test_a_pass_over_drafts_holds_copies_of_one_layer_at_a_time(monkeypatch):
    """What was gathered for a layer is gone when the next one attends."""
    hook = AttentionHook(llama(num_hidden_layers=6))
    [held] = read(hook, tokens(LENGTH))
    layers = held.stack.compressible
    size, seen = layers[0].keys.shape[-1], []
    original = module.attend

    def attend(query: Tensor, keys: Tensor, *rest: object) -> Tensor:
        found = (t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.ndim > 2)
        storages = (t.untyped_storage() for t in found if t.shape[-1] == size)
        seen.append((sum({s.data_ptr(): s.nbytes() for s in storages}.values()), keys.nbytes))
        return original(query, keys, *rest)

    monkeypatch.setattr(module, "attend", attend)
    with hook.open():
        group = Group.of(Rows(kept_shares(held, *[0.9] * 8)), DraftCache)
        Batch(hook, [group], [LENGTH] * 8).feed([[7, 8, 9]] * 8, last=1)
    new = 8 * 3 * sum(layer.keys.nbytes // LENGTH for layer in layers)  # of all layers
    first, last = seen[0][0], seen[-1][0]
    assert len(seen) == 6
    assert last - first <= 2 * new < seen[0][1]


def test_what_is_kept_is_copied_only_where_that_is_less_than_what_there_is():
    one, other = read(AttentionHook(family("llama")), *(tokens(LENGTH, seed=s) for s in (1, 2)))
    kept = [*kept_shares(one, 0.5, 0.3), *kept_shares(other, 0.5, 0.6), *kept_shares(one, 0.1)]
    sharing, alone = worth_sharing(requests_of(kept))
    assert (sorted(sharing), sorted(alone)) == ([2, 3], [0, 1, 4])
    kept.append(kept_shares(one, 0.2)[0])
    sharing, alone = worth_sharing(requests_of(kept))
    assert (sorted(sharing), alone) == (list(range(6)), [])


def test_rows_share_nothing_that_a_policy_changed():
    [held] = read(AttentionHook(family("llama")), tokens(LENGTH))
    whole = keep_all(held, LENGTH)
    own = tuple(
        (layer.keys[held.slot, :, :LENGTH], layer.values[held.slot, :, :LENGTH])
        for layer in whole.layers
    )
    changed = Kept(held, LENGTH, whole.positions, whole.held, whole.budgets, own)
    assert worth_sharing(requests_of([whole, whole])) == ([0, 1], [])
    assert worth_sharing(requests_of([changed, changed])) == ([], [0, 1])


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "gpt_oss"])
def test_layers_with_a_window_are_not_shared(name):
    model = family(name)
    [held] = read(AttentionHook(model), tokens(LENGTH))
    [(group, same)] = generation_groups(requests_of(kept_shares(held, 0.6, 0.6)), 4, 9, ALIKE)
    assert same == [0, 1]
    kinds = {"full_attention": SharedPrefixCache, "sliding_attention": DenseCache}
    expected = [kinds[kind] for kind in model.config.layer_types]
    assert [type(group.caches[index]) for index in range(len(expected))] == expected


@pytest.mark.parametrize("make", [DenseCache, DraftCache, SharedPrefixCache])
def test_rows_of_prompts_that_look_alike_are_not_mixed_up(make):
    """Same length, same places, other text: only where they lie tells their caches apart."""
    hook = AttentionHook(family("llama"))
    one, other = read(hook, *(tokens(LENGTH, seed=seed) for seed in (1, 2)))
    kept = [*kept_shares(one, 0.5), *kept_shares(other, 0.5, 0.4), *kept_shares(one, 0.5)]

    def fed(some: list[Kept]) -> Tensor:
        group = Group.of(Rows(some), make, capacity=2)
        return Batch(hook, [group], [LENGTH] * len(some)).feed([[7, 8]] * len(some), last=1)

    with hook.open():
        together, alone = fed(kept), [fed([row]) for row in kept]
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_rows_that_go_on_are_in_the_caches_that_suit_them_and_claim_what_they_hold():
    hook = AttentionHook(family("llama"))
    one, other = read(hook, *(tokens(LENGTH, seed=seed) for seed in (1, 2)))
    kept = [*kept_shares(one, 0.8, 0.4), *kept_shares(other, 0.5)]
    groups = generation_groups(requests_of(kept), 4, 9, ALIKE)
    for index in groups[0][0].caches:
        found = [(sorted(same), type(group.caches[index])) for group, same in groups]
        assert found == [([0, 1], SharedPrefixCache), ([2], DenseCache)]
    token = one.stack.position_bytes
    assert [row.bytes for row in kept] == [token * n for n in (48, 24, 30)]
    assert [row.padding for row in kept] == [0, 0, 0]
    batch = batch_of(hook, groups, LENGTH)
    assert batch.bytes == [None] * 3  # what is held is what `Kept` says
    assert batch.evicted == [0, 0, 0]


def test_joined_groups_keep_their_rows_apart():
    """Rows of several drafts write on together, padded beside each other."""
    hook = AttentionHook(family("llama"))
    [held] = read(hook, tokens(LENGTH))
    kept = kept_shares(held, 0.2, 0.3, 0.9, 0.8)
    fed = [[7], [8, 9], [10, 11, 12], [13]]  # padded beside each other

    def drafted(rows: list[int]) -> Batch:
        """Rows that read what they are fed as a draft, and are about to go on."""
        some = [kept[row] for row in rows]
        batch = Batch(hook, [Group.of(Rows(some), DraftCache)], [LENGTH] * len(rows))
        batch.feed([fed[row] for row in rows], last=1)
        groups, order = generation_groups(requests_of(some), 3, 9, ALIKE), []
        for group, same in groups:
            new = [batch.fed(at, len(fed[rows[at]]), len(fed[rows[at]])) for at in same]
            group.begin(new, [LENGTH] * len(same))
            order += [rows[at] for at in same]
        assert order == sorted(order, key=order.index)
        starts = [LENGTH + len(fed[row]) for row in order]
        joined = Batch(hook, [group for group, _ in groups], starts)
        joined.order = order
        return joined

    with hook.open():
        whole = Batch(hook, [Group.of(Rows(kept), DenseCache, capacity=9)], [LENGTH] * 4)
        whole.feed(fed, last=1)
        expected = whole.feed(fed, last=1)
        first, second = drafted([0, 1]), drafted([2, 3])
        kinds = {type(g.caches[0]) for batch in (first, second) for g in batch.groups}
        assert kinds == {DenseCache, SharedPrefixCache}
        order = first.order + second.order
        first.join(second)
        found = first.feed([fed[row] for row in order], last=1)
        first.take(sorted(order.index(row) for row in (1, 3)))
        left = [row for row in order if row in (1, 3)]
        whole.take([1, 3])
        later = first.feed([[5 + row] for row in left], last=1)
        last = whole.feed([[6], [8]], last=1)
    torch.testing.assert_close(found, expected[order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        later, last[[[1, 3].index(row) for row in left]], rtol=1e-4, atol=1e-4
    )


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.floats(0.1, 1))
def test_every_row_is_in_one_group_and_none_is_padded_much(lengths, share):
    groups = list(by_length(range(len(lengths)), lambda index: lengths[index], share))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert min(lengths[index] for index in group) >= share * longest


def test_a_row_goes_on_with_the_tokens_it_agreed_with_and_no_others():
    hook = AttentionHook(family("llama"))
    [held] = read(hook, tokens(LENGTH))
    fed = [[7, 8, 9], [7, 8]]
    with hook.open():
        batch = Batch(hook, [Group.of(Rows(kept_shares(held, 0.5, 0.5)), DraftCache)], [LENGTH] * 2)
        batch.feed(fed, last=1)
        found = [batch.fed(0, 3, agreed=1), batch.fed(1, 2, agreed=2)]
        alone = Batch(hook, [Group.of(Rows(kept_shares(held, 0.5)), DraftCache)], [LENGTH])
        alone.feed([[7, 8]], last=1)
        expected = alone.fed(0, 2, agreed=2)
    assert list(found[0]) == list(found[1]) == list(held.stack.layers)
    for layer, pair in expected.items():
        for which in (0, 1):
            torch.testing.assert_close(found[0][layer][which], pair[which][:, :1])
            torch.testing.assert_close(found[1][layer][which], pair[which])
