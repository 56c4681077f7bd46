"""The laws of what a policy evicts while decoding."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.laws.answer import STEPS, Step, evicting, freed
from pytest_kvguard.laws.traces import changed, copied, draws
from pytest_kvguard.policies import evict
from pytest_kvguard.policies.base import EMPTY, DecodeEviction, DecodeState, LayerState, Policy

Answered = Callable[[], tuple[Step, ...]]
"""What a policy leaves of a prompt, token by token; none of one that it refuses."""


@dataclass(frozen=True)
class DecodeTrial:
    """A policy that evicts, one step of decoding, others to be distracted by, and an answer."""

    policy: Policy
    used: Policy  # the same policy, which has seen every trial before; perhaps the very same object
    state: DecodeState
    other: DecodeState
    prompt: LayerState
    answered: Answered  # the answer to the prompt, made once for all laws
    steps: int = STEPS  # tokens that were to be generated

    @property
    def eviction(self) -> DecodeEviction:
        """What the policy evicts by."""
        return evicting(self.policy)

    def frees(self, state: DecodeState) -> Tensor:
        """Return the position each head frees, EMPTY for none, (R, Hkv)."""
        return freed(self.eviction, state)


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
    for count, step in enumerate(trial.answered()):
        lost = ~(step.after.positions.unsqueeze(-1) == fixed).any(dim=2)  # (R, Hkv, fixed)
        if lost.any():
            return f"freed {int(lost.sum())} protected positions within {count + 1} tokens"
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
    if broken.any():
        return f"freed {int(broken.sum())} positions of the prompt"
    for count, step in enumerate(trial.answered()):
        of_prompt = step.before.held & ~step.before.generated
        if gone := int((of_prompt & ~step.after.held).sum()):
            return f"freed {gone} positions of the prompt after {count} tokens"
    return ""


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
    if not torch.equal(first, freed(evicting(trial.used), trial.state)):
        return "chose otherwise than one that is made anew"
    return ""


def _next_token_has_a_slot(trial: DecodeTrial) -> str:
    for count, step in enumerate(trial.answered()):
        if count < trial.steps and step.after.held.all(dim=-1).any():
            return f"left no free slot of {step.after.positions.shape[-1]} after {count} tokens"
    return ""


def _no_more_than_allowed(trial: DecodeTrial) -> str:
    for count, step in enumerate(trial.answered()):
        state = step.after
        may_go = evict.evictable(trial.eviction.candidates(state), state).sum(dim=-1)
        allowed = trial.eviction.allowed(state).clamp(min=0)
        over = may_go > (allowed[:, None] if allowed.dim() == 1 else allowed)
        if over.any():
            return (
                f"held {int(may_go.max())} candidates, not {int(allowed.min())}, at {count} tokens"
            )
    return ""


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
