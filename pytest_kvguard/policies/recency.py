"""A window of recent positions that stays before anything else does."""

import torch
from torch import Tensor


def favour_latest(importance: Tensor, count: int) -> Tensor:
    """Lift the last ``count`` positions above all others, the latest highest.

    With less room than ``count`` the latest of them stay. Importances must be finite.

    importance: (Hkv, T) -> (Hkv, T)
    """
    if count == 0:
        return importance
    lifted = importance.clone()
    ranks = torch.arange(1, lifted[..., -count:].shape[-1] + 1, device=importance.device)
    lifted[..., -count:] = importance.amax(dim=-1, keepdim=True) + ranks
    return lifted
