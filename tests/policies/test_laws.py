"""Every policy obeys the laws, and a policy that breaks one is told which."""

from dataclasses import replace

import pytest
import torch

from pytest_kvguard.errors import Refused
from pytest_kvguard.laws import LAWS, check_policy
from pytest_kvguard.policies import POLICIES, get_policy
from pytest_kvguard.policies.base import Policy

KNORM, SHOTS = get_policy("knorm"), get_policy("shotkv")


@pytest.mark.parametrize(
    "spec",
    [
        *POLICIES,
        "adakv(window=3, floor=0.0)",
        "adakv(window=3, kernel=3, floor=1.0)",
        "adapyramidkv(window=4, beta=3)",
        "chunkkv(window=3, length=4)",
        "criticalkv(window=3, first=0.0)",
        "criticalkv(window=3, first=1.0)",
        "expected_attention(future=3, sinks=0)",
        "fastgen(threshold=0.0)",
        "fastgen(threshold=1.0, frequent=1.0, local=1.0)",
        "fastgen(threshold=0.5, frequent=0.0, local=0.0, window=100)",
        "h2o(heavy=0.0)",
        "h2o(heavy=1.0)",
        "lagkv(sinks=0, lag=2)",
        "lagkv(sinks=3, lag=5)",
        "pyramidkv(window=4, beta=3)",
        "shotkv(rule=stop)",
        "snapkv(window=4, kernel=3, pooling=max)",
        "streaming_llm(sinks=0, positions=cache)",
        "vatp(heavy=1.0, sinks=2)",
        "vatp(heavy=0.0, sinks=0)",
    ],
)
def test_every_policy_obeys_every_law(spec):
    check_policy(get_policy(spec))


def selecting(base: Policy, select) -> Policy:
    """The same policy with another selection, made from its mask."""

    def planted(importance, n, state):
        return select(base.select(importance, n, state), state)

    return replace(base, name="planted", select=planted)


def rating(importance) -> Policy:
    return replace(KNORM, name="planted", importance=importance)


def later_of_equals(importance, n, state):
    protected = torch.where(state.protected, float("inf"), importance)
    ranked = protected.flip(-1).argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(importance, dtype=torch.bool).scatter(-1, ranked[:, :n], True)
    return kept.flip(-1)


def ignoring_protected(importance, n, state):
    nothing = replace(state, protected=torch.zeros_like(state.protected))
    return KNORM.select(importance, n, nothing)


def splits_a_unit(mask, state):
    mask = mask.clone()
    for unit in state.units:
        mask[:, unit[-1].stop - 1] &= state.protected[unit[-1].stop - 1] or len(unit[-1]) == 1
    return mask


class RemembersThePromptBefore:
    """Its importance is that of the prompt it saw last time, as far as it goes."""

    def __init__(self):
        self.seen = None

    def __call__(self, state):
        mine = KNORM.importance(state)
        before, self.seen = self.seen, mine
        if before is None or before.shape != mine.shape:
            return mine
        return before


def changes_its_input(state):
    importance = KNORM.importance(state)
    state.keys[:] = 0
    return importance


def one_more(state, ratio):
    return min(state.length, KNORM.budget(state, ratio) + 1)


def refuses_short_prompts(state, ratio):
    if state.length < 8:
        raise Refused("too short")
    return KNORM.budget(state, ratio)


def empties_a_head(mask, state):
    return mask & (torch.arange(len(mask)) != len(mask) - 1)[:, None]


FAULTS = {
    "units stay whole": selecting(SHOTS, splits_a_unit),
    "budgets within the ratio": replace(KNORM, budget=one_more),
    "kept <= budget": selecting(KNORM, lambda mask, state: mask | mask.roll(1, -1)),
    "same state, same selection": rating(RemembersThePromptBefore()),
    "of equals, the earlier": replace(KNORM, select=later_of_equals),
    "protected stay": replace(KNORM, select=ignoring_protected),
    "something stays": selecting(KNORM, empties_a_head),
    "input unchanged": rating(changes_its_input),
    "random state unchanged": rating(lambda state: torch.rand(state.keys.shape[:2])),
    "mask is (Hkv, T) bool": selecting(KNORM, lambda mask, state: mask[0]),
    "importance is (Hkv, T) float32, never nan": rating(lambda state: state.keys.norm(dim=-1) / 0),
    "refused only when the budget cannot hold what must stay": replace(
        KNORM, budget=refuses_short_prompts
    ),
    "ratio 1 keeps all": selecting(
        KNORM, lambda mask, state: mask & ((torch.arange(state.length) != 5) | state.protected)
    ),
}


def test_there_is_a_fault_for_every_law():
    assert FAULTS.keys() == LAWS.keys()


@pytest.mark.parametrize("law", LAWS)
def test_a_broken_law_is_named_in_the_first_line(law):
    with pytest.raises(AssertionError) as broken:
        check_policy(FAULTS[law])
    first = str(broken.value).splitlines()[0]
    assert first.startswith(f"law {law!r} broken: ")


def test_a_policy_that_answers_differently_each_time_is_told_so():
    generator = torch.Generator().manual_seed(0)
    fickle = rating(lambda state: torch.rand(state.keys.shape[:2], generator=generator))
    with pytest.raises(AssertionError, match="law 'same state, same selection' broken: planted"):
        check_policy(replace(fickle, name="planted"))


def test_what_a_policy_raises_by_itself_goes_through():
    def broken(state):
        raise ZeroDivisionError("in the policy")

    with pytest.raises(ZeroDivisionError, match="in the policy"):
        check_policy(rating(broken))
