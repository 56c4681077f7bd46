"""Rows that are joined, or that others leave, go on as if they were alone."""

from functools import partial

import pytest
import torch
from torch import Tensor

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.cache.base import Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.evicting import Decoding, EvictingCache
from pytest_kvguard.engine.cache.group import Group
from pytest_kvguard.engine.cache.paged import PagedCache
from pytest_kvguard.engine.cache.quantized import QuantizedCache
from pytest_kvguard.engine.cache.shared import SharedPrefixCache
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.engine.select import Kept, keep_all
from pytest_kvguard.policies import get_policy
from tests.engine.stock import steps
from tests.tiny import family, tokens

LENGTHS = (10, 90, 40)  # so far apart that rows side by side must be padded
FED = [[7, 8, 9], [11], [12], [13], [14]]
CAPACITY = 4  # less than is fed: everything grows
NAMES = pytest.mark.parametrize("name", ["llama", "gemma3"])


def evicting(kept: tuple[Kept, ...], spec: str) -> partial:
    policy, lengths = get_policy(spec), torch.tensor([k.length + 1 for k in kept])
    decoding = Decoding(
        eviction=policy.decode,
        ratio=torch.full((len(kept),), 0.5, dtype=torch.float64),
        prompt_length=lengths,
        fresh=lengths,
        new=(9,) * len(kept),
    )
    return partial(EvictingCache, decoding=decoding, storage=policy.store)


def group_of(kind: str, *kept: Kept) -> Group:
    makes = {
        "dense": lambda: DenseCache,
        "shared": lambda: SharedPrefixCache,
        "tova": lambda: evicting(kept, "tova"),
        "h2o": lambda: evicting(kept, "h2o"),
        "h2o|int8": lambda: evicting(kept, "h2o|int8"),
        "kivi": lambda: partial(
            QuantizedCache, storage=get_policy("knorm|kivi(group=4,residual=4)").store
        ),
        "quest": lambda: partial(
            PagedCache,
            reading=get_policy("quest(page=4, dense=0)").read,
            pages=torch.full((len(kept),), 2),
        ),
    }
    return Group.of(Rows(kept), makes[kind](), sliding=DenseCache, capacity=CAPACITY)


KINDS = ["dense", "shared", "tova", "h2o", "h2o|int8", "kivi", "quest"]


def all_kept(hook: AttentionHook) -> list[Kept]:
    wanted = [Wanted(tuple(tokens(n + 1, seed=n)), slot=at) for at, n in enumerate(LENGTHS)]
    held = prefill(hook, wanted, Observe(sums=True))
    found = [keep_all(one, length) for one, length in zip(held, LENGTHS, strict=True)]
    # what evicts has less than it holds, so that each new token makes something go
    half = [length // 2 for length in LENGTHS]
    return [
        Kept(k.prefill, k.length, k.positions, k.held, (n,) * len(k.budgets))
        for k, n in zip(found, half, strict=True)
    ]


def fed_alone(hook: AttentionHook, kind: str, kept: Kept) -> list[Tensor]:
    batch = Batch(hook, [group_of(kind, kept)], [kept.length])
    first = batch.feed([FED[0]], last=1)[:, -1]
    return [first[0], *(step[0] for step in steps(batch, [[t for [t] in FED[1:]]]))]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("kind", KINDS)
@NAMES
def test_joined_rows_see_what_they_saw_alone(name, kind, order):
    hook = AttentionHook(family(name))
    with hook.open():
        kept = all_kept(hook)
        expected = [fed_alone(hook, kind, kept[row]) for row in order]
        first, second = (
            Batch(hook, [group_of(kind, kept[row])], [kept[row].length]) for row in order
        )
        first.feed([FED[0]], last=1)
        second.feed([FED[0]], last=1)
        first.join(second)
        assert len(first) == 2
        found = steps(first, [[t for [t] in FED[1:]]] * 2)
    for step, both in enumerate(found, start=1):
        for row in (0, 1):
            torch.testing.assert_close(both[row], expected[row][step], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stay", [(0,), (1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@NAMES
def test_rows_that_stay_see_what_they_saw_alone(name, kind, stay):
    hook = AttentionHook(family(name))
    with hook.open():
        kept = all_kept(hook)
        expected = [fed_alone(hook, kind, kept[row]) for row in stay]
        batch = Batch(hook, [group_of(kind, *kept)], list(LENGTHS))
        first = batch.feed([FED[0]] * 3, last=1)[:, -1]
        batch.take(list(stay))
        found = [first[list(stay)], *steps(batch, [[t for [t] in FED[1:]]] * len(stay))]
    for step, some in enumerate(found):
        for row in range(len(stay)):
            torch.testing.assert_close(some[row], expected[row][step], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "gpt_oss"])
def test_padding_in_front_leaves_nothing_behind(name, kind):
    hook = AttentionHook(family(name))
    pieces = [[FED[0][:1], FED[0][1:]], [FED[0][:2], FED[0][2:]], [FED[0], FED[1]]]
    with hook.open():
        kept = all_kept(hook)
        expected = [fed_alone(hook, kind, row) for row in kept]
        batch = Batch(hook, [group_of(kind, *kept)], list(LENGTHS))
        batch.feed([first for first, _ in pieces], last=1)
        found = batch.feed([second for _, second in pieces], last=1)[:, -1]
    assert batch.next.tolist() == [13, 93, 44]
    for row, at in enumerate((0, 0, 1)):
        torch.testing.assert_close(found[row], expected[row][at], rtol=1e-4, atol=1e-4)


def test_groups_of_all_kinds_go_through_the_model_together():
    hook = AttentionHook(family("gemma3"))
    with hook.open():
        kept = all_kept(hook)
        expected = [fed_alone(hook, kind, row) for kind in KINDS for row in kept]
        groups = [group_of(kind, *kept) for kind in KINDS]
        batch = Batch(hook, groups, list(LENGTHS) * len(KINDS))
        found = [batch.feed([FED[0]] * len(expected), last=1)[:, -1]]
        found += steps(batch, [[t for [t] in FED[1:3]]] * len(expected))
        stay = [row for row in range(len(expected)) if row % 4 != 1 and row // 3 != 2]
        batch.take(stay)
        assert len(batch.groups) == len(KINDS) - 1  # one has lost all its rows
        later = steps(batch, [[t for [t] in FED[3:]]] * len(stay))
        evicted = batch.evicted
    for step, logits in enumerate(found):
        for row, own in enumerate(expected):
            torch.testing.assert_close(logits[row], own[step], rtol=1e-4, atol=1e-4)
    for step, logits in enumerate(later, start=len(found)):
        for at, row in enumerate(stay):
            torch.testing.assert_close(logits[at], expected[row][step], rtol=1e-4, atol=1e-4)
    goes = [KINDS[row // 3] in ("h2o", "h2o|int8", "tova") for row in stay]
    assert [count > 0 for count in evicted] == goes
