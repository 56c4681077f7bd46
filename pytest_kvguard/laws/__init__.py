"""The laws every policy obeys, and states to try them on.

Put your own policy through them in one line: ``check_policy(my_policy)``, or better
``check_policy(my_factory)``, which can also compare a policy with one that has seen nothing.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Generic, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.laws.answer import STEPS, answer, evicting
from pytest_kvguard.laws.decoding import DECODE_LAWS, DecodeTrial
from pytest_kvguard.laws.memory import LONG_ANSWER, Maker, Memory
from pytest_kvguard.laws.ordinary import (
    ORDINARY_RATIO,
    corner_prompts,
    corner_steps,
    ordinary_prompts,
)
from pytest_kvguard.laws.prefill import PREFILL_LAWS, Trial, asked_for, chosen
from pytest_kvguard.laws.traces import copied
from pytest_kvguard.policies.base import DecodeState, LayerState, Policy
from pytest_kvguard.states import decode_states, layer_states, ratios

Tried = TypeVar("Tried", Trial, DecodeTrial)

__all__ = ["LAWS", "check_policy", "decode_states", "layer_states", "ratios"]

LAWS = {**PREFILL_LAWS, **DECODE_LAWS}
"""Every law by name, in the order they are tried; those of decoding on policies that evict then."""

PHASES = (Phase.generate, Phase.shrink)  # to explain takes longer than to find


def check_policy(policy: Policy | Maker, *, max_examples: int = 50) -> None:
    """Try every law on a policy and on its decode phase; the same states each time.

    policy: the policy, or better a factory of it without arguments: then every law is tried on
    a policy made anew, and one that has seen all there was must choose as these do.

    Ordinary prompts come first, then ``max_examples`` that are drawn, then the ordinary ones
    again. Raises AssertionError whose first line names the law broken and how; the smallest state
    that breaks it is added as a note. What the policy itself raises, other than Refused, goes
    through. Raises InvalidArgument for what neither is a policy nor makes one.
    """
    make, used = _maker(policy)
    prompts = [_left_by(used, each) for each in ordinary_prompts(narrowed=used.narrows)]
    states = layer_states(min_units=int(used.keeps_units), narrowed=used.narrows)
    memory = Memory(make, used, [asked_for(used, prompt) for prompt in prompts])
    _selecting(make, used, prompts, states, memory).check(max_examples)
    if used.decode is not None:
        _decoding(make, used, prompts, states, memory).check(max_examples)


def _maker(policy: Policy | Maker) -> tuple[Maker, Policy]:
    """Return what makes the policy, anew if it can be, and a policy to be used all along."""
    if isinstance(policy, Policy):
        return lambda: policy, policy
    made = policy() if callable(policy) else policy
    if not isinstance(made, Policy):
        raise InvalidArgument(
            f"check_policy takes a Policy, or a factory that makes one without arguments; got "
            f"{policy!r}"
        )
    return policy, made


def _left_by(policy: Policy, state: LayerState) -> LayerState:
    """Let what must stay be alive: earlier layers were under the same policy."""
    if state.alive is None:
        return state
    return replace(state, alive=state.alive | policy.fixed(state))


@dataclass(frozen=True)
class _Phase(Generic[Tried]):
    """The laws of a prompt, or those of decoding, and what they are tried on."""

    policy: Policy
    laws: Mapping[str, Callable[[Tried], str]]
    first: Sequence[str]  # laws without which the others mean nothing
    causes: Sequence[str]  # laws that say more exactly why a choice is not repeated
    prepared: Callable[..., Callable[[], Tried]]  # each law gets a trial of its own
    ordinary: Sequence[Mapping[str, Any]]
    drawn: Mapping[str, st.SearchStrategy[Any]]
    forgetting: str  # the law that nothing is remembered
    remembers: Callable[[], str]  # before anything else was tried
    still_remembers: Callable[[], str]

    def check(self, max_examples: int) -> None:
        """Raise AssertionError for a law that is broken."""
        self.obey({name: self.laws[name] for name in self.first}, self.ordinary[:1])
        self.forget(self.remembers)
        self.obey_what_is_drawn(max_examples)
        for index, each in enumerate(self.ordinary):
            try:
                self.obey(self.laws, [each])
            except AssertionError as problem:
                problem.add_note(f"Failing test case: number {index} of the ordinary ones")
                raise
        self.forget(self.still_remembers)

    def obey(
        self, laws: Mapping[str, Callable[[Tried], str]], found: Sequence[Mapping[str, Any]]
    ) -> None:
        """Try laws on each of what was found, one with states that no other trial has changed."""
        for each in found:
            trial = self.prepared(**each)
            for name, law in laws.items():
                if problem := law(trial()):
                    raise self.broken(name, problem)

    def broken(self, law: str, problem: str) -> AssertionError:
        """Return the error that names the law and the policy."""
        return AssertionError(f"law {law!r} broken: {self.policy.name} {problem}")

    def forget(self, remembers: Callable[[], str]) -> None:
        """Ask for ordinary prompts again."""
        if problem := remembers():
            self.obey({name: self.laws[name] for name in self.causes}, self.ordinary[:1])
            raise self.broken(self.forgetting, problem)

    def obey_what_is_drawn(self, max_examples: int) -> None:
        """Try the laws on what is drawn; the smallest that breaks one is in the error."""
        broken: list[AssertionError] = []

        @settings(
            max_examples=max_examples,
            deadline=None,
            database=None,
            derandomize=True,
            report_multiple_bugs=False,
            phases=PHASES,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(**self.drawn)
        def obey(**found: Any) -> None:
            try:
                self.obey(self.laws, [found])
            except AssertionError as problem:
                broken.append(problem)
                raise

        try:
            with warnings.catch_warnings():  # a fault that takes a long prompt has a long note
                warnings.filterwarnings("ignore", "Generating overly large repr")
                obey()
        except Flaky:  # a policy that answers differently each time does so while shrinking too
            raise broken[-1] from None


def _selecting(
    make: Maker,
    used: Policy,
    prompts: Sequence[LayerState],
    states: st.SearchStrategy[LayerState],
    memory: Memory,
) -> _Phase[Trial]:
    def prepared(state: LayerState, other: LayerState, ratio: float) -> Callable[[], Trial]:
        whole, seen = _left_by(used, state), asked_for(used, _left_by(used, other))
        chose = cache(lambda: chosen(make(), asked_for(used, copied(whole)), ratio))
        return lambda: Trial(make(), used, copied(whole), copied(seen), ratio, chose)

    corners = corner_prompts(narrowed=used.narrows, need_units=used.keeps_units)
    ordinary = [*((prompt, ORDINARY_RATIO) for prompt in prompts), *corners]
    return _Phase(
        used,
        PREFILL_LAWS,
        ("importance is (Hkv, T) float32, never nan",),
        ("random state unchanged",),
        prepared,
        [{"state": state, "other": prompts[0], "ratio": ratio} for state, ratio in ordinary],
        {"state": states, "other": states, "ratio": ratios()},
        "same state, same selection",
        memory.of_prompts,
        memory.of_prompts_anew,
    )


def _decoding(
    make: Maker,
    used: Policy,
    prompts: Sequence[LayerState],
    states: st.SearchStrategy[LayerState],
    memory: Memory,
) -> _Phase[DecodeTrial]:
    def prepared(
        state: DecodeState, other: DecodeState, prompt: LayerState, ratio: float, steps: int = STEPS
    ) -> Callable[[], DecodeTrial]:
        seen = asked_for(used, _left_by(used, prompt))
        answered = cache(lambda: tuple(answer(make(), copied(seen), ratio, steps)))
        return lambda: DecodeTrial(
            make(), used, copied(state), copied(other), copied(seen), answered, steps
        )

    sums = evicting(used).accumulate
    steps, drawn = corner_steps(sums=sums), decode_states(sums=sums)
    corners = corner_prompts(narrowed=used.narrows, need_units=used.keeps_units)
    answers = [
        *({"prompt": each, "ratio": ORDINARY_RATIO, "steps": LONG_ANSWER} for each in prompts),
        *({"prompt": prompt, "ratio": ratio} for prompt, ratio in corners),
    ]
    return _Phase(
        used,
        DECODE_LAWS,
        (
            "importance while decoding is (R, Hkv, C) float32, never nan",
            "candidates are (R, Hkv, C) bool",
            "allowed is (R,) or (R, Hkv), in whole numbers",
        ),
        ("random state unchanged while decoding",),
        prepared,
        [
            {"state": state, "other": steps[index - 1], **about}
            for index, (state, about) in enumerate(zip(steps, answers, strict=False))
        ],
        {"state": drawn, "other": drawn, "prompt": states, "ratio": ratios()},
        "same step, same choice",
        memory.of_steps,
        memory.of_steps_anew,
    )
