"""A selection that keeps its contract, or an error that says how it does not."""

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies.base import LayerState, Policy


def checked_keep(policy: Policy, importance: Tensor, state: LayerState, ratio: float) -> Tensor:
    """Select with an importance already computed, and return the mask to keep, (Hkv, T) bool.

    Raises Refused where the budget does, and InvalidArgument when the importance has another
    shape or nan in it, the budget is not in [1, T], or the mask has another shape, keeps nothing
    or too much, drops a protected position or keeps one that is gone.
    """
    shape = (state.keys.shape[0], state.length)
    where = f"policy {policy.name!r}, layer {state.layer}"
    _require(importance.shape == shape, f"{where}: importance is {_form(importance)}, not {shape}")
    _require(not importance.isnan().any(), f"{where}: importance has nan in it")
    budget = policy.budget(state, ratio)
    _require(1 <= budget <= state.length, f"{where}: budget {budget} is not in [1, {shape[1]}]")
    mask = policy.select(importance, budget, state)
    _require(
        mask.shape == shape and mask.dtype == torch.bool,
        f"{where}: the keep mask is {_form(mask)}, not {shape} bool",
    )
    return _within(policy, mask, budget, state)


def checked_reuse(policy: Policy, mask: Tensor, state: LayerState, ratio: float) -> Tensor:
    """Return the mask another layer made, (Hkv, T) bool; raise as `checked_keep` does."""
    return _within(policy, mask, policy.budget(state, ratio), state)


def _within(policy: Policy, mask: Tensor, budget: int, state: LayerState) -> Tensor:
    where = f"policy {policy.name!r}, layer {state.layer}"
    kept = mask.sum(dim=-1)
    fewest, most = int(kept.min()), int(kept.max())
    if policy.shares_heads:
        total, allowed = int(mask.sum()), budget * len(mask)
        _require(total <= allowed, f"{where}: its heads kept {total} positions, not {allowed}")
    else:
        _require(most <= budget, f"{where}: kept {most} positions, the budget is {budget}")
    _require(fewest > 0, f"{where}: a head kept no position, the budget is {budget}")
    fixed = policy.fixed(state)
    dropped = int((fixed & ~mask).any(dim=0).sum())
    _require(
        dropped == 0,
        f"{where}: dropped {dropped} of {int(fixed.sum())} protected positions, "
        f"kept {fewest} to {most}, the budget is {budget}",
    )
    if state.alive is not None:
        _require(not (mask & ~state.alive).any(), f"{where}: kept what an earlier layer dropped")
    return mask


def _require(lawful: bool | Tensor, message: str) -> None:
    if not lawful:
        raise InvalidArgument(message)


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
