"""The laws every policy obeys, and states to try them on.

Put your own policy through them in one line: ``check_policy(my_policy)``.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from pytest_kvguard.laws.decoding import DECODE_LAWS, DecodeTrial
from pytest_kvguard.laws.prefill import PREFILL_LAWS, Trial
from pytest_kvguard.laws.traces import copied
from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.states import decode_states, layer_states, ratios

Tried = TypeVar("Tried", Trial, DecodeTrial)

__all__ = ["LAWS", "check_policy", "decode_states", "layer_states", "ratios"]

LAWS = {**PREFILL_LAWS, **DECODE_LAWS}
"""Every law by name, in the order they are tried; those of decoding on policies that evict then."""

PHASES = (Phase.generate, Phase.shrink)  # to explain takes longer than to find


def check_policy(policy: Policy, *, max_examples: int = 50) -> None:
    """Try every law on a policy and on its decode phase; the same states each time.

    Raises AssertionError whose first line names the law broken and how; the smallest state that
    breaks it is added as a note. What the policy itself raises, other than Refused, goes through.
    """
    prompts = layer_states(
        window=policy.window, min_units=int(policy.keeps_units), narrowed=policy.narrows
    ).map(partial(_left_by, policy))
    drawn = {"state": prompts, "other": prompts, "ratio": ratios()}
    _obey(PREFILL_LAWS, partial(Trial, policy), drawn, max_examples)
    if policy.decode is not None:
        steps = decode_states(sums=policy.decode.accumulate)
        drawn = {"state": steps, "other": steps, "prompt": prompts, "ratio": ratios()}
        _obey(DECODE_LAWS, partial(DecodeTrial, policy), drawn, max_examples)


def _left_by(policy: Policy, state: LayerState) -> LayerState:
    """Let what must stay be alive: earlier layers were under the same policy."""
    if state.alive is None:
        return state
    return replace(state, alive=state.alive | policy.fixed(state))


def _obey(
    laws: Mapping[str, Callable[[Tried], str]],
    make: Callable[..., Tried],
    drawn: Mapping[str, st.SearchStrategy[Any]],
    max_examples: int,
) -> None:
    """Try laws on what is drawn; one that is broken is an AssertionError."""
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
    @given(**drawn)
    def obey(**found: Any) -> None:
        for name, law in laws.items():  # each with states that no other trial has changed
            own = {k: v if k == "ratio" else copied(v) for k, v in found.items()}
            trial = make(**own)
            if problem := law(trial):
                message = f"law {name!r} broken: {trial.policy.name} {problem}"
                broken.append(AssertionError(message))
                raise broken[-1]

    try:
        obey()
    except Flaky:  # a policy that answers differently each time does so while shrinking too
        raise broken[-1] from None
