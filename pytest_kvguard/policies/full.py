"""Keep every position: what a modifier that stands alone is applied to."""

import torch
from torch import Tensor

from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.policies.budgets import check_ratio


def full() -> Policy:
    """Keep every position, whatever the keep ratio, which is then a share of the bytes."""
    return Policy("full", _all_alike, keep_everything, _all, saves="bytes")


def keep_everything(state: LayerState, ratio: float) -> int:
    """Keep every position; the ratio asks for something else than positions."""
    check_ratio(ratio)
    return state.length


def _all_alike(state: LayerState) -> Tensor:
    return torch.zeros(state.keys.shape[:2], device=state.keys.device)


def _all(importance: Tensor, n: int, state: LayerState) -> Tensor:
    return torch.ones_like(importance, dtype=torch.bool)
