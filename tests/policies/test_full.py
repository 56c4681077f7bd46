"""The policy that modifiers start from."""

import pytest

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies import POLICIES
from pytest_kvguard.policies.full import full
from tests.strategies import a_state


def test_everything_is_kept_at_any_ratio():
    state = a_state(9)
    assert full().keep(state, 0.1).all()
    assert full().keep(state, 0.1).shape == state.keys.shape[:2]
    assert full().saves == "bytes"


def test_a_ratio_that_is_none_is_refused_all_the_same():
    with pytest.raises(InvalidArgument, match=r"keep ratio must be in \(0, 1\], got 1.5"):
        full().keep(a_state(9), 1.5)


def test_it_is_no_policy_of_its_own():
    assert "full" not in POLICIES
