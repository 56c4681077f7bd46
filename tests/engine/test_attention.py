"""Attention as arithmetic, against loops in float64 that know nothing of blocks and groups."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_kvguard.engine import attention as module
from pytest_kvguard.engine.attention import (
    CACHE_BLOCK,
    Scoring,
    attend,
    attend_causally,
    attend_shared,
    bias_of,
    column_sums,
    visible,
    weights_of,
)
from pytest_kvguard.policies.base import EMPTY

HEADS, GROUP, SIZE = 2, 3, 4
SINKS = torch.linspace(-1, 2, HEADS * GROUP)
SCORINGS = {
    "plain": Scoring(0.7),
    "soft cap": Scoring(0.7, softcap=1.5),
    "sinks": Scoring(0.7, sinks=SINKS),
    "both": Scoring(0.7, softcap=1.5, sinks=SINKS),
}
SCORED = pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS.keys())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_query(query: Tensor, keys: Tensor, seen: list[bool], head: int, scoring: Scoring) -> list:
    """Weights of one query (D,) over keys (T, D), one number at a time."""
    logits = []
    for key, visible_ in zip(keys.tolist(), seen, strict=True):
        logit = sum(a * b for a, b in zip(query.tolist(), key, strict=True)) * scoring.scaling
        if scoring.softcap is not None:
            logit = math.tanh(logit / scoring.softcap) * scoring.softcap
        logits.append(math.exp(logit) if visible_ else 0.0)
    sink = 0.0 if scoring.sinks is None else math.exp(float(scoring.sinks[head]))
    return [logit / (sum(logits) + sink) for logit in logits]


def looped(query: Tensor, keys: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Weights in float64: query (Hq, Q, D), keys (Hkv, T, D), mask (Hq, Q, T) -> (Hq, Q, T)."""
    query, keys = query.double(), keys.double()
    group = len(query) // len(keys)
    rows = [
        [one_query(q, keys[head // group], seen.tolist(), head, scoring) for q, seen in some]
        for head, some in enumerate(map(zip, query, mask))
    ]
    return torch.tensor(rows, dtype=torch.float64)


@SCORED
@pytest.mark.parametrize("block", [None, 1, 7, 16, 100])
@pytest.mark.parametrize(("total", "width"), [(37, 37), (37, 20), (37, 1), (1, 1)])
def test_column_sums_are_those_of_a_loop_whatever_the_block(total, width, block, scoring):
    query, keys = drawn(HEADS * GROUP, width, SIZE), drawn(HEADS, total, SIZE, seed=1)
    causal = visible(torch.arange(total), torch.arange(total - width, total))
    weights = looped(query, keys, causal.expand(HEADS * GROUP, -1, -1), scoring)
    found = column_sums(query, keys, scoring, block)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), weights.sum(dim=1), rtol=1e-5, atol=1e-5)


@SCORED
def test_column_sums_of_several_blocks_of_the_usual_size(scoring):
    total, width = 3 * CACHE_BLOCK + 5, 2 * CACHE_BLOCK + 9
    query, keys = drawn(HEADS * GROUP, width, SIZE), drawn(HEADS, total, SIZE, seed=1)
    causal = visible(torch.arange(total), torch.arange(total - width, total))
    expected = looped(query, keys, causal.expand(HEADS * GROUP, -1, -1), scoring).sum(dim=1)
    torch.testing.assert_close(column_sums(query, keys, scoring).double(), expected, rtol=1e-5,
                               atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_column_sums_of_half_precision_are_summed_in_float32(dtype):
    """A sum of 300 weights in half precision would be off by more than this."""
    query, keys = (
        drawn(HEADS * GROUP, 300, SIZE).to(dtype),
        drawn(HEADS, 300, SIZE, seed=1).to(dtype),
    )
    found = column_sums(query, keys, Scoring(0.7), 40)
    wide = column_sums(query.double(), keys.double(), Scoring(0.7), 300)
    torch.testing.assert_close(found, wide, rtol=1e-5, atol=1e-5)


def test_no_more_than_a_block_of_the_weights_exists_at_a_time(monkeypatch):
    sizes = []
    softmax = module.softmax

    def watching(logits, sinks):
        sizes.append(logits.shape[-2])
        return softmax(logits, sinks)

    monkeypatch.setattr(module, "softmax", watching)
    column_sums(drawn(HEADS * GROUP, 37, SIZE), drawn(HEADS, 37, SIZE), Scoring(0.7), 8)
    assert sizes == [8, 8, 8, 8, 5]


def masks(heads: int, rows: int, width: int, slots: int) -> Tensor:
    """Any mask in which each query sees something."""
    mask = drawn(rows, heads, width, slots, seed=5) > 0
    mask[..., 0] = True
    return mask


@SCORED
@pytest.mark.parametrize("heads", [1, HEADS, HEADS * GROUP], ids=["all", "by key head", "by head"])
@pytest.mark.parametrize("width", [1, 5, CACHE_BLOCK + 3])
def test_attending_is_what_a_loop_adds_up(width, heads, scoring):
    rows, slots = 2, 9
    query, keys = drawn(rows, HEADS * GROUP, width, SIZE), drawn(rows, HEADS, slots, SIZE, seed=1)
    values = drawn(rows, HEADS, slots, SIZE + 1, seed=2)
    mask = masks(heads, rows, width, slots)
    found = attend(query, keys, values, bias_of(mask, query.dtype), scoring)
    weights = weights_of(query, keys, bias_of(mask, query.dtype), scoring)
    wide = mask.repeat_interleave(HEADS * GROUP // heads, dim=1)
    for row in range(rows):
        own = looped(query[row], keys[row], wide[row], scoring)
        torch.testing.assert_close(weights[row].double(), own, rtol=1e-5, atol=1e-6)
        expected = own @ values[row].double().repeat_interleave(GROUP, dim=0)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)


@SCORED
def test_attending_causally_is_what_a_loop_adds_up(scoring):
    length = CACHE_BLOCK + 9
    query, keys = drawn(1, HEADS * GROUP, length, SIZE), drawn(1, HEADS, length, SIZE, seed=1)
    values = drawn(1, HEADS, length, SIZE, seed=2)
    at = torch.arange(length)
    own = looped(query[0], keys[0], visible(at, at).expand(HEADS * GROUP, -1, -1), scoring)
    expected = own @ values[0].double().repeat_interleave(GROUP, dim=0)
    found = attend_causally(query, keys, values, scoring)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)


@SCORED
@pytest.mark.parametrize("heads", [1, HEADS], ids=["all", "by key head"])
@pytest.mark.parametrize("width", [1, 4])
def test_attending_to_a_shared_prefix_is_attending_to_a_copy_of_it(width, heads, scoring):
    prompts, copies, length, own = 2, 3, 8, 5
    rows = prompts * copies
    query = drawn(rows, HEADS * GROUP, width, SIZE)
    shared = [drawn(prompts, HEADS, length, SIZE, seed=s) for s in (1, 2)]
    held = [drawn(rows, HEADS, own, SIZE, seed=s) for s in (3, 4)]
    kept = masks(heads, rows, 1, length)
    mine = masks(1, rows, width, own)
    by_prompt = bias_of(kept, torch.float32).unflatten(0, (prompts, copies)).transpose(1, 2)
    found = attend_shared(
        query, tuple(shared), by_prompt, tuple(held), bias_of(mine, torch.float32), scoring
    )
    copied = [
        torch.cat([far.repeat_interleave(copies, dim=0), near], dim=2)
        for far, near in zip(shared, held, strict=True)
    ]
    mask = torch.cat([kept.expand(-1, HEADS, width, -1), mine.expand(-1, HEADS, -1, -1)], dim=-1)
    for row in range(rows):
        wide = mask[row].repeat_interleave(GROUP, dim=0)
        own_weights = looped(query[row], copied[0][row], wide, scoring)
        expected = own_weights @ copied[1][row].double().repeat_interleave(GROUP, dim=0)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)


@given(
    st.lists(st.integers(EMPTY, 12), min_size=1, max_size=9),
    st.integers(0, 12),
    st.none() | st.integers(1, 6),
)
@settings(max_examples=200)
def test_who_sees_whom_follows_from_positions_alone(held, asking, window):
    found = visible(torch.tensor(held), torch.tensor([asking]), window)[0].tolist()
    first = 0 if window is None else asking - window + 1
    assert found == [at != EMPTY and first <= at <= asking for at in held]
