"""What is held is all the memory there is: tensors counted, for every policy, head by head.

Heads that keep different numbers lie in one tensor of a layer. What that adds is told apart, is
bounded, and counted here as well.
"""

import gc
import weakref
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from pytest_kvguard.engine.cache.base import LayerCache, Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.evicting import EvictingCache
from pytest_kvguard.engine.cache.group import Group
from pytest_kvguard.engine.cache.paged import PagedCache
from pytest_kvguard.engine.cache.shared import SharedPrefixCache
from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.grid import About, Cell, Prompt, Stopping
from pytest_kvguard.engine.groups import generation_groups, lone_group
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.requests import Request
from pytest_kvguard.engine.select import Kept, gather
from pytest_kvguard.policies import POLICIES, get_policy
from tests.engine.batches import requests_of
from tests.engine.stock import SMALL
from tests.tiny import family, tokens

RATIO = 0.5
UNITS = tuple((range(start, start + 6),) for start in range(2, 50, 6))
ABOUT = About(units=UNITS, special=(0,), punctuation=(7, 8, 31))
PROMPT = Prompt(tuple(tokens(60)), context=0, about=ABOUT)
HEADS, SIZE = 2, 12
TOKEN = 2 * SIZE * 4  # bytes of a key and a value: 12 channels each in float32
SHARING = ["adakv(window=4, floor=0.0)", "adapyramidkv(window=4)", "fastgen(threshold=0.8)"]
STORED = "|kivi(bits=4, group=4, residual=4)"
SPECS = [
    *(name + SMALL.get(name, "") for name in POLICIES),
    *SHARING,
    *(spec + after for spec in SHARING for after in ("+h2o@0.5", "+tova@0.3", STORED, "|int8")),
    f"{SHARING[0]}|rerotated",
    f"{SHARING[0]}|fair",
    f"{SHARING[0]}|reuse(layers=2)",
    f"{SHARING[0]}+h2o@0.5{STORED}",
    f"snapkv(window=4){STORED}",
]
PLAIN = [spec for spec in SPECS if get_policy(spec).store is None]
CODED = [spec for spec in SPECS if get_policy(spec).store is not None]


@cache
def request_of(spec: str) -> Request:
    return fresh_request_of(spec)


def fresh_request_of(spec: str) -> Request:
    hook = AttentionHook(family("llama"))
    with hook.open():
        [request] = requests_of(hook, spec, (RATIO,), [PROMPT])
    return request


def row_of(request: Request) -> Group:
    """One row by itself, with room for one new token."""
    with torch.inference_mode():
        return lone_group(request, 1)


def tensors(holder: object) -> Iterator[Tensor]:
    """Every tensor that a cache holds, wherever it lies."""
    for found in vars(holder).values():
        if isinstance(found, Tensor):
            yield found
        elif type(found).__module__.startswith("pytest_kvguard"):
            yield from tensors(found)


def memory(layer: LayerCache) -> int:
    """Bytes of the storages behind a layer's keys and values."""
    own = {t.untyped_storage().data_ptr(): t for t in tensors(layer) if t.shape[-1:] == (SIZE,)}
    return sum(tensor.untyped_storage().nbytes() for tensor in own.values())


def room(layer: LayerCache) -> int:
    """Bytes for a new token: a slot in every head, or the rest of two pages."""
    slots = 1
    if isinstance(layer, PagedCache):
        slots = layer.keys.shape[2] - (len(PROMPT.ids) - 1)
        assert 1 <= slots <= 2 * layer.reading.page
    return slots * HEADS * TOKEN


@pytest.mark.parametrize("spec", SHARING)
def test_heads_hold_unequal_numbers_and_together_no_more_than_the_ratio(spec):
    held = request_of(spec).kept.held + 1  # the last token is fed again
    assert (held[:, 0] != held[:, 1]).any()
    assert held.double().mean() <= RATIO * len(PROMPT.ids)


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_kept_takes_the_bytes_of_what_is_held(spec):
    kept = request_of(spec).kept
    assert kept.bytes == TOKEN * int(kept.held.sum()) == sum(x.nbytes for x in parts_of(kept))


def parts_of(kept: Kept) -> Iterator[Tensor]:
    """Keys and values (n, D) of each head alone."""
    for index, layer in enumerate(kept.layers):
        keys, values = gather(layer, kept, index)
        for head, count in enumerate(kept.held[index].tolist()):
            yield from (keys[head, :count], values[head, :count])


@pytest.mark.parametrize("spec", [*SPECS[:4], *SHARING, *SPECS[-5:]])
def test_a_row_by_itself_lets_go_of_the_prefill(spec):
    request = fresh_request_of(spec)
    prefill = weakref.ref(request.kept.prefill.stack)
    group = row_of(request)
    del request
    gc.collect()
    assert prefill() is None
    assert len(group.caches) == 3


@pytest.mark.parametrize("spec", PLAIN)
def test_a_row_takes_the_bytes_it_claims(spec):
    request = request_of(spec)
    kept = request.kept
    for cache_, held in zip(row_of(request).caches.values(), kept.held, strict=True):
        own = int(held.sum()) * TOKEN
        padding = int((held.max() - held).sum()) * TOKEN
        assert memory(cache_) - room(cache_) == own + padding
    most = TOKEN * HEADS * int(kept.held.amax(dim=1).sum())
    assert kept.bytes + kept.padding == most <= TOKEN * HEADS * 3 * (len(PROMPT.ids) - 1)


@pytest.mark.parametrize("spec", CODED)
def test_codes_take_the_bytes_they_claim_head_by_head(spec):
    request = request_of(spec)
    assert claimed(request) == codes_of(request)


def claimed(request: Request) -> int:
    return sum(int(cache_.bytes[0]) for cache_ in row_of(request).caches.values())


def codes_of(request: Request) -> int:
    """Bytes of the tensors that each head's keys and values become, each as long as it must be."""
    store, total = request.cell.policy.store, 0
    codecs = (store.keys, store.coded_keys), (store.values, store.coded_values)
    for at, part in enumerate(parts_of(request.kept)):
        codec, coded = codecs[at % 2]
        old = int(coded(torch.tensor(len(part))))
        total += sum(x.nbytes for x in (*codec.encode(part[None, :old]), part[old:]))
    return total


@cache
def grid():
    cells = [Cell(get_policy(spec), RATIO) for spec in SPECS]
    stopping = Stopping(4, frozenset(), (), lambda ids: "")
    found = Engine(AttentionHook(family("llama"))).run([PROMPT], cells, stopping)
    assert [outcome.problem for outcome in found.cells.values()] == [None] * len(SPECS)
    return dict(zip(SPECS, found.cells.values(), strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_reports_count_the_bytes_of_the_tensors(spec):
    outcome, request = grid()[spec], request_of(spec)
    if spec in CODED:
        assert (outcome.bytes_held, outcome.bytes_padding) == (codes_of(request), 0)
        return
    layers = row_of(request).caches.values()
    assert outcome.bytes_held == TOKEN * int(request.kept.held.sum())
    assert outcome.bytes_held + outcome.bytes_padding == sum(memory(x) - room(x) for x in layers)


def test_padding_is_told_where_heads_hold_unequal_numbers_and_nowhere_else():
    padded = {spec for spec, outcome in grid().items() if outcome.bytes_padding}
    assert padded >= {*SHARING, f"{SHARING[0]}+h2o@0.5", f"{SHARING[0]}|rerotated"}
    assert all(get_policy(spec).shares_heads for spec in padded)


def test_rows_are_as_long_as_the_longest_of_them():
    kept = [request_of(spec).kept for spec in SHARING]
    caches = Group.of(Rows(kept), DenseCache, capacity=8).caches
    for index, cache_ in caches.items():
        longest = max(int(row.held[index].max()) for row in kept)
        assert cache_.keys.shape == (len(kept), HEADS, longest + 8, SIZE)


@pytest.mark.parametrize("spec", [*SHARING, "snapkv(window=4)"])
def test_rows_that_share_a_prefill_hold_nothing_but_what_is_new(spec):
    hook = AttentionHook(family("llama"))
    with hook.open():
        requests = requests_of(hook, spec, (0.5, 0.75, 0.9), [PROMPT])
        [(group, _)] = generation_groups(requests, 8, 8, alike=0.9)
    stack = requests[0].kept.prefill.stack
    for layer, cache_ in zip(stack.layers.values(), group.caches.values(), strict=True):
        assert isinstance(cache_, SharedPrefixCache)
        shared = [layer.keys.untyped_storage(), layer.values.untyped_storage()]
        assert [x.untyped_storage().data_ptr() for x in cache_.prefix] == [
            x.data_ptr() for x in shared
        ]
        assert memory(cache_) == len(requests) * 8 * HEADS * TOKEN + sum(map(len, shared))


def test_heads_that_hold_equally_many_are_seen_by_one_bias():
    even, uneven = (row_of(request_of(spec)) for spec in ("snapkv(window=4)", SHARING[0]))
    assert {cache_.bias.shape[1] for cache_ in even.caches.values()} == {1}
    assert HEADS in {cache_.bias.shape[1] for cache_ in uneven.caches.values()}


def test_every_way_of_holding_was_weighed():
    kinds = {type(x) for spec in PLAIN for x in row_of(request_of(spec)).caches.values()}
    assert kinds == {DenseCache, EvictingCache, PagedCache}
