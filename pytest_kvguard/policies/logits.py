"""From products of queries and keys to attention weights, in the ways models differ."""

import torch
from torch import Tensor


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Squash logits into (-softcap, softcap) where a model does (Gemma 2, arXiv 2408.00118)."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def softmax(logits: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Normalize over the last axis: (..., Hkv, G, Q, C) -> the same.

    sinks: (Hq,) one more logit for each query head, whose weight goes to no position (gpt-oss).
    """
    if sinks is None:
        return logits.softmax(dim=-1)
    heads, groups = logits.shape[-4:-2]
    sink = sinks.to(logits.dtype).view(heads, groups, 1, 1).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
