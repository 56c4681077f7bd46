"""Policies that kvpress and we define alike, side by side.

Where a default differs, both get the same value; where a rule differs, ours is changed to
kvpress's here, so that equal answers can be asked for. docs/kvpress.md says how the rules differ.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.recency import favour_latest
from pytest_kvguard.policies.snapkv import smoothed_votes

WINDOW, KERNEL, SINKS, CHUNK = 32, 5, 4, 20

RATIOS = {12: (0.25, 0.5, 0.75), 48: (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75)}
"""Number of cells -> the keep ratios they have."""

NAMES = {
    12: ("streaming_llm", "knorm", "snapkv", "tova"),
    48: ("streaming_llm", "knorm", "snapkv", "tova", "chunkkv", "observed_attention"),
}
"""Number of cells -> the policies they have."""


@dataclass(frozen=True)
class Pair:
    """One policy on both sides."""

    ours: Policy
    press: Callable[[Any, float], Any]  # the kvpress module, share to evict -> a press
    eager: bool = False  # kvpress needs the attention weights of every query


def whole_chunks(importance: Tensor, n: int, state: LayerState) -> Tensor:
    """Keep the best runs of CHUNK positions, as many of them as the ratio leaves of all runs."""
    votes = importance.sum(dim=0)
    whole, rest = votes.split([state.length // CHUNK * CHUNK, state.length % CHUNK])
    means = whole.unflatten(0, (-1, CHUNK)).mean(dim=1)
    if len(rest):
        means = torch.cat([means, rest.mean(dim=0, keepdim=True)])
    kept = means.argsort(descending=True, stable=True)[: n // CHUNK]
    chunk = torch.arange(state.length, device=importance.device) // CHUNK
    return torch.isin(chunk, kept).expand_as(importance)


def topk(importance: Tensor, n: int, state: LayerState) -> Tensor:
    """Keep what torch.topk finds, of equals any: tokens said again have equal norms in layer 0."""
    mask = torch.zeros_like(importance, dtype=torch.bool)
    return mask.scatter(-1, importance.topk(n).indices, True)


def chunk_budget(state: LayerState, ratio: float) -> int:
    """Return the positions that the runs to keep may have."""
    share = (keep_ratio(state, ratio) + 0.5) / state.length
    return CHUNK * max(1, int(-(-state.length // CHUNK) * share))


def pairs() -> dict[str, Pair]:
    """Make every pair; ours leave generated tokens alone, as kvpress does."""
    tova = get_policy("tova")
    snapkv = get_policy(f"snapkv(window={WINDOW}, kernel={KERNEL})")
    chunkkv = Policy(
        "chunkkv",
        smoothed_votes(WINDOW, KERNEL, "avg"),
        chunk_budget,
        whole_chunks,
        window=WINDOW,
    )

    def snap_press(kvpress: Any, share: float) -> Any:
        return kvpress.SnapKVPress(share, window_size=WINDOW, kernel_size=KERNEL)

    return {
        "streaming_llm": Pair(
            replace(get_policy(f"streaming_llm(sinks={SINKS})"), decode=None),
            lambda kvpress, share: kvpress.StreamingLLMPress(share, n_sink=SINKS),
        ),
        "knorm": Pair(
            replace(get_policy("knorm"), select=topk),
            lambda kvpress, share: kvpress.KnormPress(share),
        ),
        "snapkv": Pair(snapkv, snap_press),
        "tova": Pair(
            replace(
                tova,
                importance=lambda state: favour_latest(tova.importance(state), 1),
                decode=None,
            ),
            lambda kvpress, share: kvpress.TOVAPress(share),
        ),
        "chunkkv": Pair(
            chunkkv,
            lambda kvpress, share: kvpress.ChunkKVPress(snap_press(kvpress, share), CHUNK),
        ),
        "observed_attention": Pair(
            get_policy("observed_attention"),
            lambda kvpress, share: kvpress.ObservedAttentionPress(share),
            eager=True,
        ),
    }
