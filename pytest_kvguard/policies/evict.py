"""Which slot of each head is freed after a token was decoded."""

import torch
import torch.nn.functional as F
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


def victims_at_once(eviction: DecodeEviction, state: DecodeState) -> Tensor:
    """Mark the slots that `victims` would name one after the other, (R, Hkv, C) bool.

    At most ``burst`` a head, for an importance that does not depend on what else is held.
    """
    eligible = evictable(eviction.candidates(state), state)
    importance = eviction.importance(state).masked_fill(~eligible, float("inf"))
    allowed = eviction.allowed(state).clamp(min=0)
    allowed = allowed[:, None] if allowed.dim() == 1 else allowed
    surplus = (eligible.sum(dim=-1) - allowed).clamp(min=0, max=eviction.burst)
    latest_first = state.positions.argsort(dim=-1, descending=True)
    by_rank = importance.gather(-1, latest_first).argsort(dim=-1, stable=True)
    rank = torch.arange(state.positions.shape[-1], device=importance.device)
    first = (rank < surplus.unsqueeze(-1)) & eligible.gather(-1, latest_first).gather(-1, by_rank)
    order = latest_first.gather(-1, by_rank)
    return torch.zeros_like(eligible).scatter(-1, order, first)


def attention_of_all_heads(state: DecodeState) -> Tensor:
    """Return what each position got from the newest query, (R, Hkv, C) float32.

    The mean over the query heads that hold it, so that heads which hold the same agree on what
    goes, and heads which hold different positions of the prompt can be compared.
    """
    rows, heads, slots = state.positions.shape
    votes = state.weights.unflatten(1, (heads, -1)).mean(dim=2)  # (R, Hkv, C)
    if state.limit is not None:
        at, places = state.positions.masked_fill(~state.held, state.limit), state.limit + 1
        at = at.clamp(max=state.limit)  # a row that is over is carried along for a while
    else:
        at, places = _ranks(state.positions.flatten(1)).unflatten(1, (heads, slots)), heads * slots
    count = votes.new_zeros(rows, heads, places).scatter(2, at, 1.0)
    total = _added(torch.zeros_like(count).scatter(2, at, votes))
    mean = total / count.sum(dim=1).clamp(min=1)  # (R, ranks)
    return mean.unsqueeze(1).expand(-1, heads, -1).gather(2, at).masked_fill(~state.held, 0.0)


def _added(votes: Tensor) -> Tensor:
    """Add up heads one by one, (R, Hkv, n) -> (R, n): no shape rounds otherwise than another."""
    first, *others = votes.unbind(dim=1)
    return sum(others, start=first)


def _ranks(positions: Tensor) -> Tensor:
    """Number the different positions of each row in order, equals alike, (R, n).

    There are never more numbers than places: the largest position need not be known, which would
    wait for the device.
    """
    ordered, places = positions.sort(dim=1)
    steps = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0)).cumsum(dim=1)
    return torch.empty_like(steps).scatter(1, places, steps)


def evictable(candidates: Tensor, state: DecodeState) -> Tensor:
    """Return which candidates are held, not protected and not the newest, (R, Hkv, C) bool."""
    old = candidates & state.held & (state.positions != state.newest[:, None, None])
    return old if state.protected is None else old & ~state.protected


def room_for_next(candidates: Tensor, state: DecodeState) -> Tensor:
    """Return how many candidates may be held so that the next token fits the budget, (R, Hkv)."""
    staying = state.held & ~evictable(candidates, state)
    if state.protected is not None:
        staying = staying & ~state.protected
    return rolling_room(state) - 1 - staying.sum(dim=-1)


def rolling_room(state: DecodeState) -> Tensor:
    """Return what the budget leaves each head beside what is protected, (R, Hkv).

    At least two: the token just attended leaves only after the next one has come.
    """
    rows, heads, _ = state.positions.shape
    budget = state.budget[:, None].expand(rows, heads)
    if state.protected is not None:
        budget = budget - state.protected.sum(dim=-1)
    return budget.clamp(min=2)


def rolling_slots(budget: int, new: int, ratio: float) -> int:
    """Return the slots of one row: however many tokens are new, they share the budget."""
    return max(budget, 2)
