"""Attention as arithmetic: who sees whom, and what it adds up to."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.policies.base import EMPTY

ROWS_AT_ONCE = 256  # queries whose weights exist together while columns are summed


def visible(held: Tensor, asking: Tensor, window: int | None = None) -> Tensor:
    """Say which held positions each query may see.

    held: (..., C) positions, EMPTY where nothing is; asking: (..., Q) -> (..., Q, C) bool
    """
    held, asking = held.unsqueeze(-2), asking.unsqueeze(-1)
    seen = (held != EMPTY) & (held <= asking)
    return seen if window is None else seen & (held > asking - window)


def grouped(query: Tensor, heads: int) -> Tensor:
    """Stack the queries that share a key head: (R, Hq, Q, D) -> (R, Hkv, G*Q, D)."""
    rows, _, width, size = query.shape
    return query.reshape(rows, heads, -1, size) if width else query


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attend where ``mask`` allows.

    query: (R, Hq, Q, D); keys, values: (R, Hkv, C, D); mask: (R, Hq or Hkv or 1, Q, C)
    -> (R, Hq, Q, D)
    """
    heads, groups = keys.shape[1], query.shape[1] // keys.shape[1]
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    bias.masked_fill_(~mask, float("-inf"))  # CPU kernels take it half as long as a bool mask
    if mask.shape[1] == query.shape[1]:
        bias = grouped(bias, heads)
    elif query.shape[-2] > 1:
        bias = bias.repeat(1, 1, groups, 1)  # queries are stacked group by group
    out = F.scaled_dot_product_attention(
        grouped(query, heads), keys, values, attn_mask=bias, scale=scaling
    )
    return out.reshape(query.shape[:-1] + values.shape[-1:])


def attend_causally(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attend within one run of tokens: query (R, Hq, T, D), keys, values (R, Hkv, T, D)."""
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def weights(query: Tensor, keys: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Softmax attention in float32; 0 where the mask forbids.

    query: (R, Hq, Q, D); keys: (R, Hkv, C, D); mask: (R, Hkv or 1, Q, C) -> (R, Hq, Q, C)
    """
    rows, hq, width, _ = query.shape
    heads = keys.shape[1]
    logits = grouped(query.float(), heads) @ keys.float().transpose(-1, -2) * scaling
    logits = logits.unflatten(2, (hq // heads, width))  # (R, Hkv, G, Q, C)
    logits = logits.masked_fill(~mask.unsqueeze(2), float("-inf"))
    return logits.softmax(dim=-1).reshape(rows, hq, width, -1)


def column_sums(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Sum the causal attention each key gets from the last queries of a prompt.

    query: (Hq, Q, D), the last Q of T positions; keys: (Hkv, T, D) -> (Hq, T) float32

    Never more than ROWS_AT_ONCE rows of the T x T matrix exist at a time.
    """
    total, width = keys.shape[-2], query.shape[-2]
    sums = query.new_zeros(query.shape[0], total, dtype=torch.float32)
    held = torch.arange(total, device=keys.device)
    for start in range(0, width, ROWS_AT_ONCE):
        block = query[:, start : start + ROWS_AT_ONCE]
        first = total - width + start
        asking = torch.arange(first, first + block.shape[1], device=keys.device)
        end = first + block.shape[1]  # later keys are the future of the whole block
        mask = visible(held[:end], asking)[None, None]
        sums[:, :end] += weights(block[None], keys[None, :, :end], mask, scaling)[0].sum(dim=1)
    return sums
