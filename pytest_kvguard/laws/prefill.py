"""The laws of what a policy keeps of a prompt."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.errors import Refused
from pytest_kvguard.laws.traces import changed, copied, draws
from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.policies.budgets import share, whole_pages
from pytest_kvguard.policies.units import must_stay, positions_of
from pytest_kvguard.states import recorded


@dataclass(frozen=True)
class Trial:
    """A policy put before one state, and another to be distracted by."""

    policy: Policy
    used: Policy  # the same policy, which has seen every trial before; perhaps the very same object
    whole: LayerState  # with all that can be recorded
    other: LayerState  # with what the policy asks for
    ratio: float
    chose: Callable[[], Tensor | None]  # what the policy keeps, found once for all laws

    @cached_property
    def state(self) -> LayerState:
        """The state with what the policy asks for, and no more."""
        return asked_for(self.policy, self.whole)

    def choose(self, state: LayerState, ratio: float | None = None) -> Tensor | None:
        """Return the keep mask, (Hkv, T) bool, or None when the policy refuses."""
        return chosen(self.policy, state, self.ratio if ratio is None else ratio)

    @property
    def mask(self) -> Tensor | None:
        """What the policy keeps of the state, (Hkv, T) bool; None when it refuses."""
        return self.chose()

    @cached_property
    def protected(self) -> Tensor:
        """Positions that stay under every policy, or that this one `stays` by, (T,) bool.

        What a policy declares to stay must stay, and counts where it refuses: a whitelist that no
        budget can hold is refused rightly, one that is not declared is not.
        """
        return self.policy.fixed(self.state)

    @cached_property
    def fixed(self) -> Tensor:
        """Positions that stay whatever their importance, (T,) bool."""
        if not self.policy.keeps_units:
            return self.protected
        return must_stay(replace(self.state, protected=self.protected))

    @cached_property
    def room(self) -> int:
        """Positions the keep ratio allows, at least one; all where it is no share of positions."""
        if self.policy.saves != "positions":
            return self.state.length
        return max(1, share(self.state.length, self.ratio))


BELOVED = 16.0
"""The length of a key that gets nearly all attention it can."""

LEVELS = 3
"""How many different importances there are where most positions have equals."""

TIE = 2.0**-22
"""What breaks a tie in float32, and over a whole prompt never makes up for a level."""

OTHER_RATIOS = (0.9, 0.4)
"""A policy rates a state once and selects at every ratio of the run."""

Law = Callable[[Trial], str]
"""How a trial breaks the law, to follow the policy's name; "" if it does not."""


def asked_for(policy: Policy, whole: LayerState) -> LayerState:
    """Return the state as a prefill records it for this policy alone."""
    return recorded(whole, window=policy.window, sums=policy.needs_sums, turn=policy.needs_turn)


def chosen(policy: Policy, state: LayerState, ratio: float) -> Tensor | None:
    """Return the keep mask, (Hkv, T) bool, or None when the policy refuses."""
    try:
        return policy.keep(state, ratio)
    except Refused:
        return None


def _importance_is_well_formed(trial: Trial) -> str:
    importance = trial.policy.importance(trial.state)
    if importance.shape != trial.state.keys.shape[:2] or importance.dtype != torch.float32:
        return f"gave {tuple(importance.shape)} {importance.dtype}"
    return "gave nan" if importance.isnan().any() else ""


def _refuses_only_what_cannot_be(trial: Trial) -> str:
    if trial.mask is not None:
        return ""
    reading, length = trial.policy.read, trial.state.length
    if reading and not whole_pages(length, trial.ratio, reading.page):
        return ""
    fixed = int(trial.fixed.sum())
    if fixed > trial.room:
        return ""
    if trial.policy.keeps_units and fixed == 0:
        smallest = min(len(positions_of(unit)) for unit in trial.state.units)
        if smallest > trial.policy.budget(trial.state, trial.ratio):
            return ""
    return f"refused {trial.room} positions when {fixed} must stay"


def _budgets_within_the_ratio(trial: Trial) -> str:
    layers = [replace(trial.state, layer=layer) for layer in range(trial.state.layers)]
    try:
        budgets = [trial.policy.budget(layer, trial.ratio) for layer in layers]
    except Refused:
        return ""
    if not all(1 <= budget <= trial.state.length for budget in budgets):
        return f"gave layers of {trial.state.length} positions budgets of {budgets}"
    over = sum(budgets) > trial.room * len(budgets)
    return f"gave layers {budgets}, more than {trial.room} on average" if over else ""


def _mask_is_well_formed(trial: Trial) -> str:
    mask = trial.mask
    if mask is None or (mask.shape == trial.state.keys.shape[:2] and mask.dtype == torch.bool):
        return ""
    return f"gave {tuple(mask.shape)} {mask.dtype}"


def _kept_within_the_budget(trial: Trial) -> str:
    if trial.mask is None:
        return ""
    kept, budget = trial.mask.sum(-1).tolist(), trial.policy.budget(trial.state, trial.ratio)
    if trial.policy.shares_heads:
        over = sum(kept) > budget * len(kept)
        return f"kept {kept} positions where {budget} may stay on average" if over else ""
    return f"kept {kept} positions where {budget} may stay" if max(kept) > budget else ""


def _something_stays(trial: Trial) -> str:
    return "emptied a head" if trial.mask is not None and not trial.mask.any(-1).all() else ""


def _protected_stay(trial: Trial) -> str:
    if trial.mask is None or trial.mask[:, trial.fixed].all():
        return ""
    dropped = int((trial.fixed & ~trial.mask).any(0).sum())
    return f"dropped {dropped} of {int(trial.fixed.sum())} that must stay"


def _units_stay_whole(trial: Trial) -> str:
    if trial.mask is None or not trial.policy.keeps_units:
        return ""
    for unit in trial.state.units:
        free = [at for at in positions_of(unit) if not trial.protected[at]]
        if any(row.any() and not row.all() for row in trial.mask[:, free]):
            return f"split the unit {unit}"
    return ""


def _ratio_1_keeps_all(trial: Trial) -> str:
    kept = trial.choose(trial.state, 1.0)
    if kept is None:
        return "refused"
    return "" if (kept | ~_alive(trial.state)).all() else "dropped something"


def _what_is_gone_stays_gone(trial: Trial) -> str:
    if trial.mask is None or not trial.mask[:, ~_alive(trial.state)].any():
        return ""
    return "kept what an earlier layer dropped"


def _alive(state: LayerState) -> Tensor:
    return torch.ones_like(state.protected) if state.alive is None else state.alive


def _of_equals_the_earlier(trial: Trial) -> str:
    """Break the ties of an importance in favour of what is earlier, which must change nothing."""
    state = trial.state
    generator = torch.Generator().manual_seed(state.length)
    levels = torch.randint(0, LEVELS, state.keys.shape[:2], generator=generator).float()
    ranks = torch.arange(state.length).expand_as(levels).float()
    if trial.policy.keeps_units:
        levels, ranks = torch.zeros_like(levels), torch.zeros_like(levels)
        for index, unit in enumerate(state.units):
            levels[:, positions_of(unit)] = float(index * 7 % 5 % LEVELS)
            ranks[:, positions_of(unit)] = index
    for tied in (torch.zeros_like(levels), levels):
        try:
            n = trial.policy.budget(state, trial.ratio)
            masks = [trial.policy.select(e, n, state) for e in (tied, tied - ranks * TIE)]
        except Refused:
            return ""
        if not torch.equal(*masks):
            return "kept a later one"
    return ""


def _input_unchanged(trial: Trial) -> str:
    state, before = trial.state, copied(trial.state)
    importance = trial.policy.importance(state)
    rated = importance.clone()
    trial.policy.fixed(state)
    with suppress(Refused):
        trial.policy.select(importance, trial.policy.budget(state, trial.ratio), state)
    if problem := changed(before, state):
        return problem
    return "" if torch.equal(rated, importance) else "changed the importance it selects by"


def _random_state_unchanged(trial: Trial) -> str:
    return draws(lambda: trial.choose(trial.state))


def _same_state_same_selection(trial: Trial) -> str:
    first = trial.choose(trial.state)
    trial.choose(trial.other)
    trial.choose(_backwards(trial.state))
    for ratio in OTHER_RATIOS:
        trial.choose(trial.state, ratio)
    if problem := differs(first, trial.choose(trial.state), "after another prompt"):
        return problem
    used = chosen(trial.used, trial.state, trial.ratio)
    return differs(first, used, "than one that is made anew")


def differs(first: Tensor | None, again: Tensor | None, when: str) -> str:
    """Say how a selection differs from the first one of the same state; "" if it does not."""
    if first is None or again is None:
        return "" if first is again else f"refused one time of two, {when}"
    return "" if torch.equal(first, again) else f"chose otherwise {when}"


def _what_others_recorded_changes_nothing(trial: Trial) -> str:
    """Policies share a prefill, which records what any of them asks for."""
    alone, together = trial.state, trial.whole
    rated, otherwise = trial.policy.importance(alone), trial.policy.importance(together)
    if not torch.isclose(rated, otherwise, rtol=1e-3, atol=1e-6).all():
        return "rated by what it does not ask for: queries before its `window`, sums or `turn`"
    if not torch.equal(rated, otherwise):
        return ""  # products of other sizes round otherwise, and may part what is nearly equal
    try:
        n = trial.policy.budget(alone, trial.ratio)
        first, again = (trial.policy.select(rated, n, state) for state in (alone, together))
    except Refused:
        return ""
    return differs(first, again, "where more queries, sums or `turn` were recorded")


def _no_query_sees_what_comes_after_it(trial: Trial) -> str:
    """Let the last query see nothing, so that no one may notice what its key is like.

    Exempt is what queries do not change: how keys or values lie to each other may rate every
    position by every other, since the tokens to come see them all. So is a policy that turns
    queries to positions to come (`needs_turn`), where they see the whole prompt.
    """
    state, importance = trial.state, trial.policy.importance
    if state.queries.shape[1] < 2 or trial.policy.needs_turn:
        return ""
    turned_round = replace(state, queries=-state.queries)
    if torch.equal(importance(state), importance(turned_round)):
        return ""
    queries, loved = state.queries.clone(), state.keys.clone()
    queries[:, -1] = 0
    earlier = queries[:, :-1].unflatten(0, (len(loved), -1)).float().sum(dim=(1, 2))  # (Hkv, D)
    loved[:, -1] = (BELOVED * F.normalize(earlier, dim=-1)).to(loved.dtype)
    plain = loved.clone()
    plain[:, -1] = 0
    rated = [importance(replace(state, queries=queries, keys=keys)) for keys in (loved, plain)]
    one, other = (each[:, :-1] for each in rated)
    moved = ~torch.isclose(one, other, rtol=1e-3, atol=1e-6)
    return f"rated {int(moved.sum())} positions by a key they cannot see" if moved.any() else ""


def _backwards(state: LayerState) -> LayerState:
    """Return a prompt of the same shape, for a policy that tells prompts apart by theirs."""
    return replace(state, keys=state.keys.flip(-2), queries=-state.queries)


PREFILL_LAWS: dict[str, Law] = {
    "importance is (Hkv, T) float32, never nan": _importance_is_well_formed,
    "refused only when the budget cannot hold what must stay": _refuses_only_what_cannot_be,
    "budgets within the ratio": _budgets_within_the_ratio,
    "mask is (Hkv, T) bool": _mask_is_well_formed,
    "kept <= budget": _kept_within_the_budget,
    "something stays": _something_stays,
    "protected stay": _protected_stay,
    "units stay whole": _units_stay_whole,
    "what is gone stays gone": _what_is_gone_stays_gone,
    "ratio 1 keeps all": _ratio_1_keeps_all,
    "of equals, the earlier": _of_equals_the_earlier,
    "input unchanged": _input_unchanged,
    "random state unchanged": _random_state_unchanged,
    "same state, same selection": _same_state_same_selection,
    "what other policies recorded changes nothing": _what_others_recorded_changes_nothing,
    "no query sees what comes after it": _no_query_sees_what_comes_after_it,
}
"""By name, in the order they are tried."""
