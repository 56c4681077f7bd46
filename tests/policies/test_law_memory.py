"""A policy that remembers anything is told so, however soon it has seen enough."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import Phase

from pytest_kvguard import laws
from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.laws import check_policy
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import DecodeState, LayerState, Policy

KNORM, SHOTS = get_policy("knorm"), get_policy("shotkv")


@pytest.fixture(autouse=True)
def unshrunk(monkeypatch):
    """The first state that breaks a law will do; the smallest takes most of the time."""
    monkeypatch.setattr(laws, "PHASES", (Phase.generate,))


def evicting(base: Policy, **changes) -> Policy:
    return replace(base, decode=replace(base.decode, **changes))


class Counts:
    """Positions in front rise with each call, until a dozen calls have come."""

    def __init__(self, calls: int = 12) -> None:
        self.most, self.calls = calls, 0

    def __call__(self, state: LayerState) -> torch.Tensor:
        self.calls = min(self.most, self.calls + 1)
        rated = KNORM.importance(state).clone()
        rated[:, : self.calls] += 9
        return rated


class Calibrates:
    """The first prompt it sees sets a scale, and none changes it again."""

    def __init__(self) -> None:
        self.scale: torch.Tensor | None = None

    def __call__(self, state: LayerState) -> torch.Tensor:
        if self.scale is None:
            self.scale = state.keys.float().mean()
        return KNORM.importance(state) + self.scale * torch.arange(state.length)


class Late:
    """Nothing shows before five hundred calls have come."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, state: LayerState) -> torch.Tensor:
        self.calls += 1
        sign = -1 if self.calls > 500 and state.length > 300 else 1
        return sign * KNORM.importance(state)


@pytest.mark.parametrize("calls", [3, 12, 40])
def test_a_memory_that_is_soon_full_is_seen_before_it_is(calls):
    with pytest.raises(AssertionError, match="law 'same state, same selection' broken: knorm "):
        check_policy(replace(KNORM, importance=Counts(calls)))


def test_a_memory_that_shows_late_is_seen_in_the_end():
    with pytest.raises(AssertionError, match="law 'same state, same selection' broken: knorm "):
        check_policy(replace(KNORM, importance=Late()))


def test_what_the_first_prompt_set_for_good_shows_beside_a_policy_made_anew():
    check_policy(replace(KNORM, importance=Calibrates()), max_examples=5)  # cannot be told
    with pytest.raises(AssertionError, match="chose otherwise than one that is made anew"):
        check_policy(lambda: replace(KNORM, importance=Calibrates()))


class CountsSteps:
    """Holds more with each step, until a dozen steps have come, of whatever answer."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, state: DecodeState) -> torch.Tensor:
        self.calls = min(12, self.calls + 1)
        return SHOTS.decode.allowed(state).clamp(max=self.calls // 3)


class StartsAnew:
    """Counts the steps of an answer, and forgets them when the next prompt comes."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, state: DecodeState) -> torch.Tensor:
        begun = bool((state.newest < state.prompt_length).any())
        self.steps = 0 if begun else self.steps + 1
        return SHOTS.decode.allowed(state).clamp(max=self.steps // 3)


class FirstAnswer:
    """How long the first prompt was says how much is held of every answer."""

    def __init__(self) -> None:
        self.length: int | None = None

    def __call__(self, state: DecodeState) -> torch.Tensor:
        if self.length is None:
            self.length = int(state.prompt_length[0])
        return SHOTS.decode.allowed(state).clamp(max=self.length % 5)


@pytest.mark.parametrize("remembers", [CountsSteps, StartsAnew])
def test_a_memory_of_steps_is_seen(remembers):
    with pytest.raises(AssertionError, match="law 'same step, same choice' broken: shotkv "):
        check_policy(evicting(SHOTS, allowed=remembers()))


def test_what_the_first_answer_set_for_good_shows_beside_a_policy_made_anew():
    with pytest.raises(AssertionError, match="law 'same step, same choice' broken: shotkv "):
        check_policy(lambda: evicting(SHOTS, allowed=FirstAnswer()))


@pytest.mark.parametrize("spec", ["snapkv", "shotkv", "pyramidinfer", "snapkv+h2o@0.5"])
def test_a_factory_of_a_policy_obeys_the_laws_as_the_policy_does(spec):
    check_policy(partial(get_policy, spec), max_examples=10)


@pytest.mark.parametrize("wrong", ["snapkv", lambda: "snapkv", None])
def test_what_is_no_policy_and_makes_none_is_refused(wrong):
    with pytest.raises(InvalidArgument, match="a Policy, or a factory that makes one"):
        check_policy(wrong)
