"""An answer decoded with eviction, as the engine would, but for the model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.errors import Refused
from pytest_kvguard.laws.traces import copied
from pytest_kvguard.policies import evict
from pytest_kvguard.policies.base import EMPTY, DecodeEviction, DecodeState, LayerState, Policy

STEPS = 16
"""Tokens an answer has, more than a policy of ours counts before it evicts (SCOPE's `every`)."""


@dataclass(frozen=True)
class Step:
    """A token of an answer: what is held when it was attended, and what is left."""

    before: DecodeState
    after: DecodeState


def evicting(policy: Policy) -> DecodeEviction:
    """Return what a policy evicts by."""
    if policy.decode is None:
        raise AssertionError("only a policy that evicts while decoding is tried")
    return policy.decode


def freed(eviction: DecodeEviction, state: DecodeState) -> Tensor:
    """Return the position each head frees first, EMPTY for none, (R, Hkv)."""
    slot = evict.victims(eviction, state)
    position = state.positions.gather(2, slot.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(slot == EMPTY, EMPTY, position)


def left(eviction: DecodeEviction, state: DecodeState) -> DecodeState:
    """Return what is held when all that a token may free is gone."""
    for _ in range(eviction.burst):
        slot = evict.victims(eviction, state).unsqueeze(-1)
        at = slot.clamp(min=0)
        gone = torch.where(slot == EMPTY, state.positions.gather(2, at), EMPTY)
        state = replace(state, positions=state.positions.scatter(2, at, gone))
    return state


def answer(policy: Policy, prompt: LayerState, ratio: float, steps: int = STEPS) -> Iterator[Step]:
    """Let a row of the prompt generate so many tokens, or until a head has no free slot.

    As in the engine, the last token of the prompt is fed once more, and a token that comes takes
    a free slot of each head. A prompt that is refused has no answer.
    """
    lasting = F.pad(policy.fixed(prompt), (0, steps + 1))  # by position
    prompt = replace(prompt, protected=prompt.protected.clone())
    prompt.protected[-1] = True
    try:
        mask = policy.keep(prompt, ratio)[:, :-1]
        budget = policy.budget(prompt, ratio)
    except Refused:
        return
    eviction, length, heads = evicting(policy), prompt.length, len(mask)
    ratio = ratio if policy.decode_ratio is None else policy.decode_ratio
    most = int(mask.sum(dim=-1).max()) + 1
    least = max(budget, most, int(lasting.sum()) + 2)
    slots = max(eviction.slots(least, steps + 1, ratio), most)
    positions = torch.full((1, heads, slots), EMPTY)
    for head, kept in enumerate(mask):
        positions[0, head, : int(kept.sum())] = kept.nonzero().flatten()
    generator = torch.Generator().manual_seed(length)
    for step in range(steps + 1):
        if (positions != EMPTY).all(dim=-1).any():
            return
        slot = (positions == EMPTY).int().argmax(dim=-1, keepdim=True)
        positions = positions.scatter(2, slot, length - 1 + step)
        logits = torch.randn(1, len(prompt.queries), slots, generator=generator)
        free = (positions == EMPTY).repeat_interleave(logits.shape[1] // heads, dim=1)
        paid = torch.rand(positions.shape, generator=generator)
        before = DecodeState(
            weights=logits.masked_fill(free, float("-inf")).softmax(dim=-1),
            sums=paid if eviction.accumulate else None,
            positions=positions,
            newest=torch.tensor([length - 1 + step]),
            prompt_length=torch.tensor([length]),
            budget=torch.tensor([budget]),
            ratio=torch.tensor([ratio], dtype=torch.float64),
            protected=lasting[positions.clamp(min=0)] & (positions != EMPTY),
        )
        after = left(eviction, copied(before))
        positions = after.positions
        yield Step(before, after)
