"""Which positions stay, given their importance and how many may.

A selector takes importance (Hkv, T), N and the state, and returns a mask (Hkv, T) bool with at
most N positions a head, or on average over the heads, every protected one among them. Of equals,
the earlier stays.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.errors import Refused
from pytest_kvguard.parameters import check_choice, check_count, check_share
from pytest_kvguard.policies.base import LayerState, Selector
from pytest_kvguard.policies.budgets import share
from pytest_kvguard.policies.units import check_units, must_stay, positions_of

HUGE = torch.finfo(torch.float32).max


def top_tokens(importance: Tensor, n: int, state: LayerState) -> Tensor:
    """Keep the n most important positions of each head."""
    return top_after(protected_of(importance, state), importance, n)


def top_after(first: Tensor, importance: Tensor, n: int) -> Tensor:
    """Keep n of each row: those marked ``first``, then the others, each by importance.

    first: (..., T) bool; importance: (..., T) -> (..., T) bool
    """
    ranked = importance.argsort(dim=-1, descending=True, stable=True)  # topk leaves ties open
    ahead = first.gather(-1, ranked).byte().argsort(dim=-1, descending=True, stable=True)
    kept = ranked.gather(-1, ahead)[..., :n]
    return torch.zeros_like(first).scatter(-1, kept, True)


def protected_of(importance: Tensor, state: LayerState) -> Tensor:
    """Return the protected positions for every head, where the importance is, (Hkv, T) bool."""
    return state.protected.to(importance.device).expand_as(importance)


def top_over_heads(floor: float) -> Selector:
    """Return a selector that lets the heads of a layer compete for Hkv times N positions.

    Each head first keeps its own best: a ``floor`` share of N rounded down, at least one and at
    least what is protected. The rest goes to the most important positions of all heads; of
    equals the earlier, then the one of the lower head. Importances must compare across heads.
    """
    check_share("floor", floor)

    def select(importance: Tensor, n: int, state: LayerState) -> Tensor:
        heads, length = importance.shape
        sure = max(1, share(n, floor), int(state.protected.sum()))
        own = top_tokens(importance, sure, state)
        # side by side in order of position, so that of equals the earlier comes first
        mask = top_after(own.T.flatten(), importance.T.flatten(), n * heads)
        return mask.reshape(length, heads).T

    return select


def top_chunks(length: int, alone: int = 0) -> Selector:
    """Return a selector of runs of ``length`` positions, by the mean importance of each run.

    The runs start at position 0; the last ``alone`` positions belong to none and stand each for
    itself. Of the first run that does not fit the earliest positions stay, so that exactly N do.
    """
    check_count("length", length)
    check_count("alone", alone, least=0)

    def select(importance: Tensor, n: int, state: LayerState) -> Tensor:
        border = max(0, state.length - alone)
        exact = _exact(importance)
        means = _run_means(exact[..., :border], length)
        # the positions of a run are now equals, and of equals the earlier stays
        mask = top_tokens(torch.cat([means, exact[..., border:]], dim=-1), n, state)
        return mask.to(importance.device)

    return select


def whole_units(rule: str = "skip") -> Selector:
    """Return a selector of whole units, the same ones for every head.

    A unit counts as the mean over its tokens of the importance, summed over heads. Units are
    taken greedily, the best first; at one that does not fit, ``"skip"`` goes on with the next
    and ``"stop"`` ends. What is protected or outside all units always stays and is charged;
    a unit costs those of its positions that are not.

    Raises InvalidArgument for a prompt without units, and Refused when nothing at all would stay.
    """
    check_choice("rule", rule, ("skip", "stop"))

    def select(importance: Tensor, n: int, state: LayerState) -> Tensor:
        check_units(state)
        kept = set(must_stay(state).nonzero().flatten().tolist())
        room = n - len(kept)
        for index in _best_units_first(_exact(importance).sum(dim=0), state):
            added = set(positions_of(state.units[index])) - kept
            if len(added) <= room:
                kept |= added
                room -= len(added)
            elif rule == "stop":
                break
        if not kept:
            raise Refused(
                f"none of the {len(state.units)} units fits into {n} of {state.length} positions, "
                "and nothing else would stay; raise the keep ratio"
            )
        mask = torch.zeros(state.length, dtype=torch.bool)
        mask[list(kept)] = True
        return mask.to(importance.device).expand_as(importance)

    return select


def _best_units_first(votes: Tensor, state: LayerState) -> list[int]:
    means = [float(votes[positions_of(unit)].mean()) for unit in state.units]
    return sorted(range(len(means)), key=lambda index: -means[index])  # sorted() is stable


def _run_means(importance: Tensor, length: int) -> Tensor:
    """Replace each value by the mean of its run of ``length``; the last run may be shorter."""
    heads, total = importance.shape
    count, padding = -(-total // length), -total % length
    runs = F.pad(importance, (0, padding)).reshape(heads, count, length)
    sizes = F.pad(torch.ones(total), (0, padding)).reshape(count, length).sum(-1)
    return (runs.sum(-1) / sizes).repeat_interleave(length, dim=-1)[..., :total]


def _exact(importance: Tensor) -> Tensor:
    """Return finite float64 on the CPU, where sums of equals are equal and no inf meets -inf."""
    return importance.cpu().double().clamp(-HUGE, HUGE)
