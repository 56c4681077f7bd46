from dataclasses import replace

import pytest
import torch

from pytest_kvguard.errors import InvalidArgument, Refused
from pytest_kvguard.policies import POLICIES, get_policy
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.check import checked_keep
from pytest_kvguard.policies.selectors import top_tokens
from tests.strategies import a_state

STATE = a_state(10, protected=(9,), units=((range(0, 4),), (range(4, 9),)), layer=2, layers=4)
SOUND = Policy("mine", lambda state: torch.zeros(2, 10), keep_ratio, top_tokens)


def selecting(select):
    return replace(SOUND, select=lambda importance, n, state: select(importance, n))


def checked(policy, ratio=0.5):
    return checked_keep(policy, policy.importance(STATE), STATE, ratio)


def rows(*counts):
    """A mask that keeps the last ``count`` positions of each head."""
    return torch.stack([torch.arange(10) >= 10 - count for count in counts])


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_sound_policy_keeps_goes_through(name):
    policy = get_policy("quest(page=5)" if name == "quest" else name)  # pages must fit
    assert torch.equal(checked(policy), policy.keep(STATE, 0.5))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (rows(5, 6), "kept 6 positions, the budget is 5"),
        (rows(0, 5), "a head kept no position, the budget is 5"),
        (rows(5), r"the keep mask is \(1, 10\) bool, not \(2, 10\) bool"),
        (rows(5, 5).float(), r"the keep mask is \(2, 10\) float32, not \(2, 10\) bool"),
        (~rows(5, 5), "dropped 1 of 1 protected positions, kept 5 to 5, the budget is 5"),
    ],
    ids=["oversize", "empty", "shape", "dtype", "protected"],
)
def test_a_mask_that_breaks_the_contract_names_policy_layer_kept_and_budget(mask, message):
    policy = selecting(lambda importance, n: mask)
    with pytest.raises(InvalidArgument, match=f"policy 'mine', layer 2: .*{message}"):
        checked(policy)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.zeros(10), r"importance is \(10,\) float32, not \(2, 10\)"),
        (torch.full((2, 10), float("nan")), "importance has nan in it"),
    ],
    ids=["shape", "nan"],
)
def test_an_importance_that_breaks_the_contract_is_named(importance, message):
    with pytest.raises(InvalidArgument, match=f"policy 'mine', layer 2: {message}"):
        checked_keep(SOUND, importance, STATE, 0.5)


@pytest.mark.parametrize("budget", [0, -1, 11])
def test_a_budget_out_of_range_is_named(budget):
    policy = replace(SOUND, budget=lambda state, ratio: budget)
    with pytest.raises(InvalidArgument, match=rf"budget {budget} is not in \[1, 10\]"):
        checked(policy)


def test_a_refusal_of_the_budget_goes_through():
    with pytest.raises(Refused, match="is 2, but 3 are protected"):
        checked_keep(SOUND, torch.zeros(2, 10), a_state(10, protected=(1, 2, 3)), 0.2)
