"""Attention as arithmetic: who sees whom, and what it adds up to."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.policies.base import EMPTY

ROWS_AT_ONCE = 64  # queries whose weights exist together while columns are summed: they fit a cache


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
    if mask.shape[1] == 1 and query.device.type == "cpu":  # its kernel shares keys by itself
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=bias, scale=scaling, enable_gqa=groups > 1
        )
    if mask.shape[1] == query.shape[1]:
        bias = grouped(bias, heads)
    elif query.shape[-2] > 1:
        bias = bias.repeat(1, 1, groups, 1)  # queries are stacked group by group
    out = F.scaled_dot_product_attention(
        grouped(query, heads), keys, values, attn_mask=bias, scale=scaling
    )
    return out.reshape(query.shape[:-1] + values.shape[-1:])


def attend_beside(
    query: Tensor,
    shared: tuple[Tensor, Tensor],
    hidden: Tensor,
    own: tuple[Tensor, Tensor],
    mask: Tensor,
    scaling: float,
) -> Tensor:
    """Attend to keys and values that all rows share, and to each row's own.

    query: (R, Hq, Q, D); shared: keys and values, (Hkv, T, D); hidden: (Hkv, R, T), 0 or -inf to
    add to the logits; own: keys and values, (R, Hkv, C, D), seen where mask (R, 1, Q, C) allows
    -> (R, Hq, Q, D)

    What is shared is read once for all rows (Juravsky et al. 2024, arXiv 2402.05099).
    """
    rows, heads, length = len(query), len(shared[0]), shared[0].shape[1]
    by_head = grouped(query, heads) * scaling  # (R, Hkv, G*Q, D)
    stacked = by_head.transpose(0, 1).flatten(1, 2)  # (Hkv, R*G*Q, D)
    far = (stacked @ shared[0].transpose(-1, -2)).unflatten(1, (rows, -1)) + hidden.unsqueeze(2)
    near = (by_head @ own[0].transpose(-1, -2)).unflatten(2, (-1, query.shape[-2]))
    near = near.masked_fill(~mask.unsqueeze(2), float("-inf")).flatten(2, 3).transpose(0, 1)
    weights = torch.cat([far, near], dim=-1).softmax(dim=-1)  # (Hkv, R, G*Q, T + C)
    seen = (weights[..., :length].flatten(1, 2) @ shared[1]).unflatten(1, (rows, -1))
    out = seen.transpose(0, 1) + weights[..., length:].transpose(0, 1) @ own[1]
    return out.reshape(query.shape[:-1] + out.shape[-1:])


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
    total, width, groups = keys.shape[-2], query.shape[-2], len(query) // len(keys)
    sums = query.new_zeros(query.shape[0], total, dtype=torch.float32)
    query, keys = query.float() * scaling, keys.float().transpose(-1, -2)
    for start in range(0, width, ROWS_AT_ONCE):
        block = query[:, start : start + ROWS_AT_ONCE]
        first = total - width + start
        end = first + block.shape[1]  # later keys are the future of the whole block
        stacked = block.unflatten(0, (-1, groups)).flatten(1, 2)  # (Hkv, G*Q, D)
        logits = (stacked @ keys[..., :end]).view(len(query), -1, end)
        future = torch.ones(block.shape[1], block.shape[1], dtype=torch.bool, device=keys.device)
        logits[..., first:].masked_fill_(future.triu(1), float("-inf"))
        sums[:, :end] += logits.softmax(dim=-1).sum(dim=1)
    return sums
