"""Attention as arithmetic: who sees whom, and what it adds up to."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.policies.base import EMPTY
from pytest_kvguard.policies.logits import capped, softmax

CACHE_BLOCK = 64
"""Queries whose weights exist together on a CPU: a block fits the processor's cache."""

DEVICE_BLOCK = 2**28
"""Bytes of weights that exist together on an accelerator."""

WIDE_PRODUCTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
"""Whether torch multiplies half-precision matrices into float32 on a GPU."""


@dataclass(frozen=True)
class Scoring:
    """How a layer turns products of queries and keys into weights."""

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None  # (Hq,)

    @property
    def plain(self) -> bool:
        """Whether scaled dot products and a softmax are all there is to it."""
        return self.softcap is None and self.sinks is None


@dataclass(frozen=True)
class AttentionCall:
    """One layer's part of one pass of the model."""

    layer: int
    query: Tensor  # (R, Hq, Q, D), rotated
    key: Tensor  # (R, Hkv, Q, D), rotated; of the new tokens only
    value: Tensor  # (R, Hkv, Q, D)
    scoring: Scoring
    window: int | None  # positions a sliding layer sees, the token itself included
    output: Tensor | None = None  # (Hq, D, M) what the output projection makes of each head


def visible(held: Tensor, asking: Tensor, window: int | None = None) -> Tensor:
    """Say which held positions each query may see.

    held: (..., C) positions, EMPTY where nothing is; asking: (..., Q) -> (..., Q, C) bool
    """
    held, asking = held.unsqueeze(-2), asking.unsqueeze(-1)
    seen = (held != EMPTY) & (held <= asking)
    return seen if window is None else seen & (held > asking - window)


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a mask adds to logits: 0 where it allows, -inf where not."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, float("-inf")
    )


def grouped(query: Tensor, heads: int) -> Tensor:
    """Stack the queries that share a key head: (R, Hq, Q, D) -> (R, Hkv, G*Q, D)."""
    rows, _, width, size = query.shape
    return query.reshape(rows, heads, -1, size) if width else query


def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scoring: Scoring) -> Tensor:
    """Attend with an attention bias.

    query: (R, Hq, Q, D); keys, values: (R, Hkv, C, D); bias: (R or 1, Hq or Hkv or 1, Q, C)
    -> (R, Hq, Q, D)
    """
    if not scoring.plain:
        return _attend_in_blocks(query, keys, values, bias, scoring)
    heads, groups = keys.shape[1], query.shape[1] // keys.shape[1]
    if bias.shape[1] == 1 and query.device.type == "cpu":  # its kernel shares keys by itself
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=bias, scale=scoring.scaling, enable_gqa=groups > 1
        )
    if bias.shape[1] == query.shape[1]:
        bias = grouped(bias, heads)
    elif query.shape[-2] > 1:
        bias = bias.repeat(1, 1, groups, 1)  # queries are stacked group by group
    out = F.scaled_dot_product_attention(
        grouped(query, heads), keys, values, attn_mask=bias, scale=scoring.scaling
    )
    return out.reshape(query.shape[:-1] + values.shape[-1:])


def attend_causally(query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
    """Attend within runs of tokens: query (R, Hq, T, D), keys, values (R, Hkv, T, D)."""
    if not scoring.plain:
        at = torch.arange(query.shape[2], device=query.device)
        bias = bias_of(visible(at, at), query.dtype)[None, None]
        return attend(query, keys, values, bias, scoring)
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        is_causal=True,
        scale=scoring.scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def attend_shared(
    query: Tensor,
    shared: tuple[Tensor, Tensor],
    shared_bias: Tensor,
    own: tuple[Tensor, Tensor],
    own_bias: Tensor,
    scoring: Scoring,
) -> Tensor:
    """Attend to keys and values that M rows share, and to each row's own.

    query: (P*M, Hq, Q, D); shared: keys and values (P, Hkv, T, D); shared_bias: (P, Hkv, M, 1, T);
    own: keys and values (P*M, Hkv, C, D); own_bias: (P*M, 1, Q, C) -> (P*M, Hq, Q, D)

    What is shared is read once for all rows (Hydragen, arXiv 2402.05099, section 3).
    """
    rows, _, width, _ = query.shape
    prompts, heads, length = shared[0].shape[:3]
    by_head = grouped(query, heads)  # (P*M, Hkv, G*Q, D)
    stacked = by_head.unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3)
    far = products(stacked, shared[0], scoring.scaling)
    far = capped(far, scoring.softcap).unflatten(2, (rows // prompts, -1)) + shared_bias
    near = products(by_head, own[0], scoring.scaling).unflatten(2, (-1, width))
    near = capped(near, scoring.softcap) + own_bias.unsqueeze(2)  # (P*M, Hkv, G, Q, C)
    by_row = far.transpose(1, 2).flatten(0, 1).unflatten(2, (-1, width))
    weights = softmax(torch.cat([by_row, near], dim=-1), scoring.sinks).to(query.dtype)
    weights = weights.flatten(2, 3)  # (P*M, Hkv, G*Q, T + C)
    far = weights[..., :length].unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3)
    seen = (far @ shared[1]).unflatten(2, (rows // prompts, -1)).transpose(1, 2).flatten(0, 1)
    out = seen + weights[..., length:] @ own[1]
    return out.reshape(query.shape[:-1] + out.shape[-1:])


def products(query: Tensor, keys: Tensor, scaling: float = 1.0) -> Tensor:
    """Scale the product of each query with each key, in float32 or wider.

    query: (A, B, n, D); keys: (A, B, m, D) -> (A, B, n, m)
    """
    across = keys.transpose(-1, -2)
    if query.dtype in (torch.float32, torch.float64):
        return (query * scaling) @ across
    if query.is_cuda and WIDE_PRODUCTS:  # no copy of the keys, and no rounding of the sums
        out = torch.bmm(query.flatten(0, 1), across.flatten(0, 1), out_dtype=torch.float32)
        return out.unflatten(0, query.shape[:2]).mul_(scaling)
    return (query.float() * scaling) @ across.float()


def weights_of(query: Tensor, keys: Tensor, bias: Tensor, scoring: Scoring) -> Tensor:
    """Softmax attention in float32; 0 where the bias forbids.

    query: (R, Hq, Q, D); keys: (R, Hkv, C, D); bias: (R or 1, Hq or Hkv or 1, Q, C)
    -> (R, Hq, Q, C)
    """
    rows, hq, width, _ = query.shape
    heads = keys.shape[1]
    logits = products(grouped(query, heads), keys, scoring.scaling)
    logits = capped(logits, scoring.softcap).unflatten(2, (-1, width))  # (R, Hkv, G, Q, C)
    by_group = bias.unflatten(1, (heads, -1)) if bias.shape[1] == hq else bias.unsqueeze(2)
    return softmax(logits + by_group, scoring.sinks).reshape(rows, hq, width, -1)


def mix(weights: Tensor, values: Tensor) -> Tensor:
    """Weigh values (R, Hkv, C, D): (R, Hq, Q, C) -> (R, Hq, Q, D)."""
    by_head = grouped(weights.to(values.dtype), values.shape[1])
    return (by_head @ values).reshape(*weights.shape[:-1], values.shape[-1])


def column_sums(query: Tensor, keys: Tensor, scoring: Scoring, block: int | None = None) -> Tensor:
    """Sum the causal attention each key gets from the last queries of a prompt.

    query: (Hq, Q, D), the last Q of T positions; keys: (Hkv, T, D) -> (Hq, T) float32

    Never more than ``block`` rows of the T x T matrix exist at a time.
    """
    total, width, groups = keys.shape[-2], query.shape[-2], len(query) // len(keys)
    block = block or queries_at_once(query, total)
    sums = query.new_zeros(query.shape[0], total, dtype=torch.float32)
    query, keys = query.float() * scoring.scaling, keys.float().transpose(-1, -2)
    for start in range(0, width, block):
        some = query[:, start : start + block]
        first = total - width + start
        end = first + some.shape[1]  # later keys are the future of the whole block
        stacked = some.unflatten(0, (-1, groups)).flatten(1, 2)  # (Hkv, G*Q, D)
        logits = capped(stacked @ keys[..., :end], scoring.softcap)
        logits = logits.unflatten(1, (groups, -1))  # (Hkv, G, Q, T)
        future = torch.ones(some.shape[1], some.shape[1], dtype=torch.bool, device=keys.device)
        logits[..., first:].masked_fill_(future.triu(1), float("-inf"))
        sums[:, :end] += softmax(logits, scoring.sinks).sum(dim=2).flatten(0, 1)
    return sums


def queries_at_once(query: Tensor, keys: int) -> int:
    """Return how many queries (Hq, Q, D) may be weighed against this many keys at a time."""
    if query.device.type == "cpu":
        return CACHE_BLOCK
    return max(CACHE_BLOCK, DEVICE_BLOCK // (4 * query.shape[-3] * max(1, keys)))


def _attend_in_blocks(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scoring: Scoring
) -> Tensor:
    """Attend where no fused kernel knows the scoring, some queries at a time."""
    block = queries_at_once(query, keys.shape[2] * len(query))
    parts = [
        mix(weights_of(some, keys, part, scoring), values)
        for some, part in zip(query.split(block, dim=2), bias.split(block, dim=2), strict=True)
    ]
    return torch.cat(parts, dim=2)
