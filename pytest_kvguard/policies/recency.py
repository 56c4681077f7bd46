"""Positions at the ends of a prompt that stay before anything else does."""

import torch
from torch import Tensor


def favour_latest(importance: Tensor, count: int) -> Tensor:
    """Lift the last ``count`` positions above all others of any head, the latest highest.

    With less room than ``count`` the latest of them stay. Importances must be finite.

    importance: (Hkv, T) -> (Hkv, T)
    """
    if count == 0:
        return importance
    lifted = importance.clone()
    ranks = torch.arange(1, lifted[..., -count:].shape[-1] + 1, device=importance.device)
    highest = importance.amax()
    lifted[..., -count:] = highest + ranks * _step(highest)
    return lifted


def favour_earliest(importance: Tensor, count: int) -> Tensor:
    """Lift the first ``count`` positions above all others of any head, all of them alike.

    importance: (Hkv, T), finite -> (Hkv, T)
    """
    lifted = importance.clone()
    highest = importance.amax()
    lifted[..., :count] = highest + _step(highest)
    return lifted


def _step(highest: Tensor) -> Tensor:
    """Return a difference that does not drown in the rounding of sums with ``highest``."""
    return (highest.abs() * 4 * torch.finfo(highest.dtype).eps).clamp(min=1)
