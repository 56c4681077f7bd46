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
    lifted[..., -count:] = importance.amax() + ranks
    return lifted


def favour_earliest(importance: Tensor, count: int) -> Tensor:
    """Lift the first ``count`` positions above all others of any head, all of them alike.

    importance: (Hkv, T), finite -> (Hkv, T)
    """
    lifted = importance.clone()
    lifted[..., :count] = importance.amax() + 1
    return lifted
