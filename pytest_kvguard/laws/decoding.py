"""The laws of what a policy evicts while decoding."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.errors import Refused
from pytest_kvguard.laws.traces import changed, copied, draws
from pytest_kvguard.policies import evict
from pytest_kvguard.policies.base import EMPTY, DecodeEviction, DecodeState, LayerState, Policy

STEPS = 8
"""Tokens a simulated row generates."""


@dataclass(frozen=True)
class DecodeTrial:
    """A policy that evicts, one step of decoding, another to be distracted by, and a prompt."""

    policy: Policy
    state: DecodeState
    other: DecodeState
    prompt: LayerState
    ratio: float

    @property
    def eviction(self) -> DecodeEviction:
        """What the policy evicts by."""
        if self.policy.decode is None:
            raise AssertionError("only a policy that evicts while decoding is tried")
        return self.policy.decode

    def frees(self, state: DecodeState) -> Tensor:
        """Return the position each head frees, EMPTY for none, (R, Hkv)."""
        slot = evict.victims(self.eviction, state)
        position = state.positions.gather(2, slot.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(slot == EMPTY, EMPTY, position)


Law = Callable[[DecodeTrial], str]
"""How a trial breaks the law, to follow the policy's name; "" if it does not."""


def _importance_is_well_formed(trial: DecodeTrial) -> str:
    importance = trial.eviction.importance(trial.state)
    if importance.shape != trial.state.positions.shape or importance.dtype != torch.float32:
        return f"gave {tuple(importance.shape)} {importance.dtype}"
    return "gave nan" if importance[trial.state.held].isnan().any() else ""


def _candidates_are_well_formed(trial: DecodeTrial) -> str:
    candidates = trial.eviction.candidates(trial.state)
    shape = trial.state.positions.shape
    if candidates.shape == shape and candidates.dtype == torch.bool:
        return ""
    return f"gave {tuple(candidates.shape)} {candidates.dtype}"


def _allowed_is_well_formed(trial: DecodeTrial) -> str:
    allowed, shape = trial.eviction.allowed(trial.state), trial.state.positions.shape
    if allowed.shape in (shape[:1], shape[:2]) and not allowed.is_floating_point():
        return ""
    return f"gave {tuple(allowed.shape)} {allowed.dtype}"


def _newest_stays(trial: DecodeTrial) -> str:
    freed = trial.frees(trial.state) == trial.state.newest[:, None]
    return "freed the newest token" if freed.any() else ""


def _protected_stay(trial: DecodeTrial) -> str:
    freed, state = trial.frees(trial.state), trial.state
    if state.protected is not None:
        slots = (state.positions == freed.unsqueeze(-1)) & state.protected
        if slots.any():
            return f"freed {int(slots.sum())} protected slots"
    fixed = trial.policy.fixed(trial.prompt).nonzero().flatten()
    for step, later in _decoded(trial):
        lost = ~(later.positions.unsqueeze(-1) == fixed).any(dim=2)  # (R, Hkv, fixed)
        if lost.any():
            return f"freed {int(lost.sum())} protected positions within {step + 1} tokens"
    return ""


def _only_held_candidates_go(trial: DecodeTrial) -> str:
    slots = evict.victims(trial.eviction, trial.state)
    may_go = F.pad(trial.eviction.candidates(trial.state) & trial.state.held, (0, 1), value=True)
    wrong = ~may_go.gather(2, (slots % may_go.shape[-1]).unsqueeze(-1))  # -1: the last, none
    return f"freed {int(wrong.sum())} slots that hold no candidate" if wrong.any() else ""


def _least_important_goes(trial: DecodeTrial) -> str:
    freed = trial.frees(trial.state)
    for row, head, ranked in _rankings(trial):
        expected = ranked[0] if ranked else EMPTY
        if int(freed[row, head]) != expected:
            return f"freed {int(freed[row, head])}, not {expected}"
    return ""


def _rankings(trial: DecodeTrial) -> Iterator[tuple[int, int, list[int]]]:
    """Yield row, head and the candidates of heads that hold too many, the first to go first."""
    state, eviction = trial.state, trial.eviction
    may_go = evict.evictable(eviction.candidates(state), state)
    importance, allowed = eviction.importance(state), eviction.allowed(state)
    for row, heads in enumerate(state.positions.tolist()):
        for head, positions in enumerate(heads):
            rated = zip(positions, importance[row, head].tolist(), strict=True)
            old = [pair for pair, may in zip(rated, may_go[row, head].tolist(), strict=True) if may]
            most = int(allowed[row] if allowed.dim() == 1 else allowed[row, head])
            old.sort(key=lambda pair: (pair[1], -pair[0]))
            yield row, head, [at for at, _ in old] if len(old) > max(0, most) else []


def _slots_have_no_order(trial: DecodeTrial) -> str:
    state = trial.state
    group = state.weights.shape[1] // state.positions.shape[1]
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(state.positions.shape, generator=generator).argsort(dim=-1)
    turned = replace(
        state,
        weights=state.weights.gather(2, order.repeat_interleave(group, dim=1)),
        sums=None if state.sums is None else state.sums.gather(2, order),
        positions=state.positions.gather(2, order),
        protected=None if state.protected is None else state.protected.gather(2, order),
    )
    same = torch.equal(trial.frees(state), trial.frees(turned))
    return "" if same else "freed another position where slots were in another order"


def _free_slots_change_nothing(trial: DecodeTrial) -> str:
    """Slots that never held anything, and what a free slot still has of the token it held."""
    state = trial.state
    sums = None if state.sums is None else state.sums.masked_fill(~state.held, 1e6)
    wider = replace(
        state,
        weights=F.pad(state.weights, (3, 2)),
        sums=None if sums is None else F.pad(sums, (3, 2), value=-1e6),
        positions=F.pad(state.positions, (3, 2), value=EMPTY),
        protected=None if state.protected is None else F.pad(state.protected, (3, 2)),
    )
    same = torch.equal(trial.frees(state), trial.frees(wider))
    return "" if same else "freed another position where more slots were free"


def _rows_do_not_see_each_other(trial: DecodeTrial) -> str:
    together = trial.frees(trial.state)
    for row in range(len(together)):
        alone = trial.frees(_rows(trial.state, slice(row, row + 1)))[0]
        if not torch.equal(alone, together[row]):
            return f"freed {together[row].tolist()} beside other rows, {alone.tolist()} alone"
    return ""


def _rows(state: DecodeState, rows: slice) -> DecodeState:
    return DecodeState(
        weights=state.weights[rows],
        sums=None if state.sums is None else state.sums[rows],
        positions=state.positions[rows],
        newest=state.newest[rows],
        prompt_length=state.prompt_length[rows],
        budget=state.budget[rows],
        ratio=state.ratio[rows],
        protected=None if state.protected is None else state.protected[rows],
    )


def _prompt_of_whole_units_stays(trial: DecodeTrial) -> str:
    if not trial.policy.keeps_units:
        return ""
    freed = trial.frees(trial.state)
    broken = (freed != EMPTY) & (freed < trial.state.prompt_length[:, None])
    return f"freed {int(broken.sum())} positions of the prompt" if broken.any() else ""


def _input_unchanged(trial: DecodeTrial) -> str:
    before = copied(trial.state)
    trial.frees(trial.state)
    return changed(before, trial.state)


def _random_state_unchanged(trial: DecodeTrial) -> str:
    return draws(lambda: trial.frees(trial.state))


def _same_step_same_choice(trial: DecodeTrial) -> str:
    first = trial.frees(trial.state)
    flipped = replace(trial.state, weights=trial.state.weights.flip(1))
    not_begun = replace(trial.state, prompt_length=trial.state.newest + 1)
    for other in 2 * (trial.other, flipped, not_begun):
        trial.frees(other)
        if not torch.equal(first, trial.frees(trial.state)):
            return "chose otherwise after another step"
    return ""


def _next_token_has_a_slot(trial: DecodeTrial) -> str:
    for step, state in _decoded(trial):
        if step < STEPS and (state.held.all(dim=-1)).any():
            return f"left no free slot of {state.positions.shape[-1]} after {step} tokens"
    return ""


def _no_more_than_allowed(trial: DecodeTrial) -> str:
    for step, state in _decoded(trial):
        may_go = evict.evictable(trial.eviction.candidates(state), state).sum(dim=-1)
        allowed = trial.eviction.allowed(state).clamp(min=0)
        over = may_go > (allowed[:, None] if allowed.dim() == 1 else allowed)
        if over.any():
            return (
                f"held {int(may_go.max())} candidates, not {int(allowed.min())}, at {step} tokens"
            )
    return ""


def _decoded(trial: DecodeTrial) -> Iterator[tuple[int, DecodeState]]:
    """Let a row of the prompt generate; yield the state after each token, and how many there are.

    As in the engine, the last token of the prompt is fed once more, and a token that comes takes
    a free slot of each head.
    """
    prompt = replace(trial.prompt, protected=trial.prompt.protected.clone())
    prompt.protected[-1] = True
    try:
        mask = trial.policy.keep(prompt, trial.ratio)[:, :-1]
        budget = trial.policy.budget(prompt, trial.ratio)
    except Refused:
        return
    own, length, heads = trial.policy.decode_ratio, prompt.length, len(mask)
    ratio = trial.ratio if own is None else own
    most = int(mask.sum(dim=-1).max()) + 1
    lasting = F.pad(trial.policy.fixed(trial.prompt), (0, STEPS + 1))  # by position
    least = max(budget, most, int(lasting.sum()) + 2)
    slots = max(trial.eviction.slots(least, STEPS + 1, ratio), most)
    positions = torch.full((1, heads, slots), EMPTY)
    for head, kept in enumerate(mask):
        positions[0, head, : int(kept.sum())] = kept.nonzero().flatten()
    generator = torch.Generator().manual_seed(length)
    for step in range(STEPS + 1):
        if (positions != EMPTY).all(dim=-1).any():
            return
        slot = (positions == EMPTY).int().argmax(dim=-1, keepdim=True)
        positions = positions.scatter(2, slot, length - 1 + step)
        logits = torch.randn(1, len(prompt.queries), slots, generator=generator)
        free = (positions == EMPTY).repeat_interleave(logits.shape[1] // heads, dim=1)
        paid = torch.rand(positions.shape, generator=generator)
        state = DecodeState(
            weights=logits.masked_fill(free, float("-inf")).softmax(dim=-1),
            sums=paid if trial.eviction.accumulate else None,
            positions=positions,
            newest=torch.tensor([length - 1 + step]),
            prompt_length=torch.tensor([length]),
            budget=torch.tensor([budget]),
            ratio=torch.tensor([ratio], dtype=torch.float64),
            protected=lasting[positions.clamp(min=0)] & (positions != EMPTY),
        )
        for _ in range(trial.eviction.burst):
            slot = evict.victims(trial.eviction, state).unsqueeze(-1)
            gone = torch.where(slot == EMPTY, state.positions.gather(2, slot.clamp(min=0)), EMPTY)
            left = state.positions.scatter(2, slot.clamp(min=0), gone)
            state = replace(state, positions=left)
        positions = state.positions
        yield step, state


DECODE_LAWS: dict[str, Law] = {
    "importance while decoding is (R, Hkv, C) float32, never nan": _importance_is_well_formed,
    "candidates are (R, Hkv, C) bool": _candidates_are_well_formed,
    "allowed is (R,) or (R, Hkv), in whole numbers": _allowed_is_well_formed,
    "the newest token stays": _newest_stays,
    "protected stay while decoding": _protected_stay,
    "only held candidates go": _only_held_candidates_go,
    "of candidates, the least important, of equals the latest": _least_important_goes,
    "slots have no order": _slots_have_no_order,
    "free slots change nothing": _free_slots_change_nothing,
    "rows do not see each other": _rows_do_not_see_each_other,
    "a prompt of whole units stays": _prompt_of_whole_units_stays,
    "step unchanged": _input_unchanged,
    "random state unchanged while decoding": _random_state_unchanged,
    "same step, same choice": _same_step_same_choice,
    "the next token has a slot": _next_token_has_a_slot,
    "no more candidates than allowed": _no_more_than_allowed,
}
"""By name, in the order they are tried."""
