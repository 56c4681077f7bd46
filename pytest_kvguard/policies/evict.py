"""Which slot of each head is freed after a token was decoded."""

import torch
from torch import Tensor

from pytest_kvguard.policies.base import DecodeEviction, DecodeState


def victims(eviction: DecodeEviction, state: DecodeState) -> Tensor:
    """Return the slot each head frees, or -1 for none, (R, Hkv) int64.

    A slot is freed when more candidates are held than allowed: the candidate of the lowest
    importance, of equals the latest. The newest token is no candidate. Nothing waits for the
    device.
    """
    eligible = evictable(eviction.candidates(state), state)
    importance = eviction.importance(state).masked_fill(~eligible, float("inf"))
    lowest = eligible & (importance == importance.amin(dim=-1, keepdim=True))
    latest = state.positions.masked_fill(~lowest, -1).argmax(dim=-1)  # (R, Hkv)
    allowed = eviction.allowed(state).clamp(min=0)
    if allowed.dim() == 1:
        allowed = allowed[:, None]
    return torch.where(eligible.sum(dim=-1) > allowed, latest, -1)


def evictable(candidates: Tensor, state: DecodeState) -> Tensor:
    """Return which candidates are held and not the newest token, (R, Hkv, C) bool."""
    return candidates & state.held & (state.positions != state.newest[:, None, None])


def room_for_next(candidates: Tensor, state: DecodeState) -> Tensor:
    """Return how many candidates may be held so that the next token fits the budget, (R, Hkv)."""
    staying = state.held & ~evictable(candidates, state)
    return rolling_room(state.budget)[:, None] - 1 - staying.sum(dim=-1)


def rolling_room(budget: Tensor) -> Tensor:
    """Return the slots of rows that stay within their budget, (R,).

    At least two: the token just attended leaves only after the next one has come.
    """
    return budget.clamp(min=2)


def rolling_slots(budget: int, new: int, ratio: float) -> int:
    """Return `rolling_room` for one row: however many tokens are new, they share the budget."""
    return max(budget, 2)
