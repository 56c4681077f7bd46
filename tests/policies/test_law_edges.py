"""Policies that break a law only at an edge are told so all the same."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase

from pytest_kvguard import laws
from pytest_kvguard.errors import Refused
from pytest_kvguard.laws import check_policy
from pytest_kvguard.policies import evict, get_policy
from pytest_kvguard.policies.base import DecodeState, LayerState, Policy

KNORM, SNAP = get_policy("knorm"), get_policy("snapkv(window=8)")
SHOTS, TOVA = get_policy("shotkv"), get_policy("tova")


@pytest.fixture(autouse=True)
def unshrunk(monkeypatch):
    """The first state that breaks a law will do; the smallest takes most of the time."""
    monkeypatch.setattr(laws, "PHASES", (Phase.generate,))


def rating(at: Callable[[LayerState], bool], rate, base: Policy = KNORM) -> Policy:
    """The same policy with another importance where the edge is."""
    return replace(base, importance=lambda s: (rate if at(s) else base.importance)(s))


def selecting(at: Callable[[LayerState], bool], select, base: Policy = KNORM) -> Policy:
    """The same policy with another selection where the edge is."""
    return replace(base, select=lambda i, n, s: (select if at(s) else base.select)(i, n, s))


def budgeting(budget: Callable[[LayerState, float, int], int]) -> Policy:
    return replace(KNORM, budget=lambda s, ratio: budget(s, ratio, KNORM.budget(s, ratio)))


def nan_in_one(state):
    rated = KNORM.importance(state).clone()
    rated[-1, -1] = float("nan")
    return rated


def refuses(state, ratio, budget):
    if state.keys.dtype == torch.bfloat16:
        raise Refused("not in this type")
    return budget


def drops_protected(importance, n, state):
    return KNORM.select(importance, n, replace(state, protected=torch.zeros_like(state.protected)))


def one_head_more(importance, n, state):
    """Only the last head keeps one more."""
    mask = KNORM.select(importance, n, state).clone()
    spare = ~mask[-1]
    if spare.any():
        mask[-1, spare.int().argmax()] = True
    return mask


def empties_the_last_head(importance, n, state):
    mask = KNORM.select(importance, n, state).clone()
    mask[-1] = state.protected
    return mask


def has_single_unit(state):
    return any(len(unit) == len(unit[0]) == 1 for unit in state.units)


def splits_units(importance, n, state):
    """All but the first position of each unit go."""
    mask = SHOTS.select(importance, n, state).clone()
    if mask.all():
        return mask
    for unit in state.units:
        rest = torch.tensor([at for span in unit for at in span][1:], dtype=torch.long)
        mask[:, rest] &= state.protected[rest]
    return mask


def unstable(importance, n, state):
    """Ties fall as a sort of rounded numbers leaves them: backwards among those of one level."""
    protected = torch.where(state.protected, float("inf"), importance)
    if (importance == importance[:, :1]).all():
        return KNORM.select(importance, n, state)
    ranked = protected.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(importance, dtype=torch.bool).scatter(-1, ranked[:, :n], True).flip(-1)


def writes_into_the_importance(importance, n, state):
    importance += 0
    importance[..., -1:] = importance.amax() + 1
    return KNORM.select(importance, n, state)


def sees_the_future(state):
    keys = state.keys.repeat_interleave(len(state.queries) // len(state.keys), dim=0)
    logits = state.queries[:, -8:].float() @ keys.float().mT * state.scaling
    return logits.softmax(dim=-1).unflatten(0, (len(state.keys), -1)).sum(dim=(1, 2))


def drops_one(importance, n, state):
    mask = KNORM.select(importance, n, state).clone()
    if n == state.length > 2 and not state.protected[1]:
        mask[:, 1] = False
    return mask


def kept_though_gone(importance, n, state):
    return KNORM.select(torch.where(state.alive, importance, -torch.inf), n, state) & state.alive


def nothing_yet(state):
    return []


def first_budget_decides(importance, n, state):
    met = state.once(nothing_yet)
    met.append(n)
    return KNORM.select(importance, min(met), state)


def last_layer(state):
    return state.layer == state.layers - 1 > 0


EDGES: dict[str, tuple[str, Policy]] = {
    "nan for keys that are zero": (
        "importance is (Hkv, T) float32, never nan",
        rating(lambda s: bool((s.keys == 0).all(-1).any() and s.keys.any()), nan_in_one),
    ),
    "half precision for float16 keys": (
        "importance is (Hkv, T) float32, never nan",
        rating(
            lambda s: s.keys.dtype == torch.float16, lambda s: KNORM.importance(s).to(torch.float16)
        ),
    ),
    "refuses bfloat16": (
        "refused only when the budget cannot hold what must stay",
        budgeting(refuses),
    ),
    "one more in deep models": (
        "budgets within the ratio",
        budgeting(lambda s, ratio, n: min(s.length, n + (s.layers > 8))),
    ),
    "one more at a ratio near 1": (
        "budgets within the ratio",
        budgeting(lambda s, ratio, n: min(s.length, n + (ratio > 0.94))),
    ),
    "one more where the prompt is long": (
        "budgets within the ratio",
        budgeting(lambda s, ratio, n: n + (s.length > 300 and n < s.length)),
    ),
    "whole numbers for a mask in the last layer": (
        "mask is (Hkv, T) bool",
        selecting(last_layer, lambda *a: KNORM.select(*a).int()),
    ),
    "the last of four heads keeps more": (
        "kept <= budget",
        selecting(lambda s: len(s.keys) == 4, one_head_more),
    ),
    "a head emptied in bfloat16": (
        "something stays",
        selecting(lambda s: s.keys.dtype == torch.bfloat16, empties_the_last_head),
    ),
    "protected dropped when only the end is": (
        "protected stay",
        selecting(lambda s: bool(s.protected[-1]) and int(s.protected.sum()) == 1, drops_protected),
    ),
    "protected dropped when they are many": (
        "protected stay",
        selecting(lambda s: int(s.protected.sum()) > 6, drops_protected),
    ),
    "units split where one is a single position": (
        "units stay whole",
        replace(selecting(has_single_unit, splits_units, SHOTS), decode=None),
    ),
    "what is gone kept in deep models": (
        "what is gone stays gone",
        replace(
            KNORM,
            narrows=True,
            select=lambda i, n, s: (KNORM.select if s.layers > 8 else kept_though_gone)(i, n, s),
        ),
    ),
    "one dropped at ratio 1 in a single layer": (
        "ratio 1 keeps all",
        selecting(lambda s: s.layers == 1, drops_one),
    ),
    "ties that are not all there is": (
        "of equals, the earlier",
        selecting(lambda s: True, unstable),
    ),
    "importance written into under a template": (
        "input unchanged",
        selecting(
            lambda s: bool(s.passages) and s.passages[0].kind == "template",
            writes_into_the_importance,
        ),
    ),
    "random in a prompt without text in units": (
        "random state unchanged",
        rating(lambda s: not s.units, lambda s: KNORM.importance(s) + 0 * torch.rand(1)),
    ),
    "a smaller ratio before this one": (
        "same state, same selection",
        selecting(lambda s: s.length > 9, first_budget_decides),
    ),
    "more queries than its window, in the middle": (
        "what other policies recorded changes nothing",
        rating(
            lambda s: 0 < s.layer < s.layers - 1,
            lambda s: SNAP.importance(s) * s.queries.float().mean(),
            SNAP,
        ),
    ),
    "the future of odd lengths": (
        "no query sees what comes after it",
        rating(lambda s: s.length % 2 == 1, sees_the_future, SNAP),
    ),
}
"""What it does and when: the law it breaks, and the policy."""


@pytest.mark.parametrize("edge", EDGES)
def test_a_law_that_is_broken_only_at_an_edge_is_named(edge):
    law, policy = EDGES[edge]
    with pytest.raises(AssertionError, match="law ") as broken:
        check_policy(policy)
    assert str(broken.value).startswith(f"law {law!r} broken: ")


def evicting(base: Policy, **changes) -> Policy:
    return replace(base, decode=replace(base.decode, **changes))


def far(state: DecodeState) -> torch.Tensor:
    """Rows of answers that have come further than ten tokens, (R,)."""
    return state.newest - state.prompt_length > 10


def slot_by_slot_when_many(state):
    importance = TOVA.decode.importance(state)
    if state.positions.shape[-1] < 60:
        return importance
    return torch.arange(state.positions.shape[-1]).float().expand_as(importance)


DECODE_EDGES: dict[str, tuple[str, Policy]] = {
    "nan after ten tokens": (
        "importance while decoding is (R, Hkv, C) float32, never nan",
        evicting(
            TOVA,
            importance=lambda s: TOVA.decode.importance(s).masked_fill(
                far(s)[:, None, None], float("nan")
            ),
        ),
    ),
    "whole numbers for candidates that none are protected of": (
        "candidates are (R, Hkv, C) bool",
        evicting(TOVA, candidates=lambda s: s.held if s.protected is not None else s.held.int()),
    ),
    "by slot when there are many": (
        "slots have no order",
        evicting(TOVA, importance=slot_by_slot_when_many),
    ),
    "three rows share what is allowed": (
        "rows do not see each other",
        evicting(
            SHOTS,
            allowed=lambda s: (
                SHOTS.decode.allowed(s).amax().expand_as(s.newest)
                if len(s.newest) > 2
                else SHOTS.decode.allowed(s)
            ),
        ),
    ),
    "the prompt goes after ten tokens": (
        "a prompt of whole units stays",
        evicting(
            SHOTS,
            candidates=lambda s: s.generated | ((s.positions == 0) & far(s)[:, None, None]),
            allowed=lambda s: torch.zeros_like(s.newest),
            burst=2,
        ),
    ),
    "one more after ten tokens": (
        "the next token has a slot",
        evicting(TOVA, allowed=lambda s: TOVA.decode.allowed(s) + far(s)[:, None]),
    ),
}


@pytest.mark.parametrize("edge", DECODE_EDGES)
def test_a_law_of_decoding_that_is_broken_only_at_an_edge_is_named(edge):
    law, policy = DECODE_EDGES[edge]
    with pytest.raises(AssertionError, match="law ") as broken:
        check_policy(policy)
    assert str(broken.value).startswith(f"law {law!r} broken: ")


@pytest.mark.parametrize("heads", [1, 4])
def test_the_newest_token_goes_with_some_numbers_of_heads_only(heads, monkeypatch):
    plain = evict.victims

    def victims(eviction, state):
        if state.positions.shape[1] != heads:
            return plain(eviction, state)
        return (state.positions == state.newest[:, None, None]).int().argmax(dim=-1)

    monkeypatch.setattr(evict, "victims", victims)
    with pytest.raises(AssertionError, match="law 'the newest token stays' broken"):
        check_policy(TOVA)
