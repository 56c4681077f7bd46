import re
from fractions import Fraction
from math import floor, inf, nan

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_kvguard.errors import InvalidArgument, Refused
from pytest_kvguard.policies.budgets import (
    check_ratio,
    keep_ratio,
    keep_ratio_of_units,
    pyramid,
    share,
    shares,
)
from tests.strategies import a_state

PERCENT = st.integers(1, 100)


@pytest.mark.parametrize("value", [0, 1.5, nan, inf, -inf, -0.1, True, "0.5", None, 1 + 1e-9])
def test_a_ratio_outside_its_range_is_refused_with_its_value(value):
    with pytest.raises(InvalidArgument, match=re.escape(f"must be in (0, 1], got {value!r}")):
        check_ratio(value)


@pytest.mark.parametrize("value", [1, 1.0, 0.25, 1e-6])
def test_a_ratio_in_its_range_comes_back_as_a_float(value):
    assert check_ratio(value) == value
    assert isinstance(check_ratio(value), float)


@given(count=st.integers(0, 200_000), percent=PERCENT)
@example(count=100, percent=53)  # in float32 this is 52.999996
def test_a_share_is_the_whole_part_of_the_decimal_as_typed(count, percent):
    expected = floor(Fraction(percent, 100) * count)
    assert share(count, percent / 100) == expected
    assert shares(torch.tensor([count]), percent / 100).item() == expected


@pytest.mark.parametrize(("ratio", "count", "kept"), [(0.3, 10, 3), (0.29, 100, 29), (0.7, 10, 7)])
def test_floating_point_takes_no_position_away(ratio, count, kept):
    assert keep_ratio(a_state(count), ratio) == kept


def test_the_budget_is_rounded_down():
    assert keep_ratio(a_state(10), 0.39) == 3


def test_one_position_is_kept_at_any_ratio():
    assert keep_ratio(a_state(5), 0.01) == 1


def test_ratio_1_keeps_every_position():
    assert keep_ratio(a_state(17), 1.0) == 17


def test_a_budget_that_cannot_hold_what_is_protected_says_which_ratio_would():
    state = a_state(40, protected=(0, 1, 2, 3, 4, 5, 39))
    with pytest.raises(Refused, match=r"0\.1 of 40 positions is 4, but 7 are protected; .* 0\.175"):
        keep_ratio(state, 0.1)
    assert keep_ratio(state, 0.175) == 7


@given(length=st.integers(1, 300), data=st.data())
def test_the_ratio_it_names_would_do(length, data):
    protected = data.draw(st.integers(1, length))
    state = a_state(length, protected=tuple(range(protected)))
    ratio = data.draw(PERCENT) / 100
    try:
        assert keep_ratio(state, ratio) >= protected
    except Refused as error:
        enough = float(str(error).rsplit(" ", 1)[1])
        assert keep_ratio(state, enough) >= protected
        assert enough - protected / length < 0.001


def test_protected_positions_are_charged_and_not_added():
    assert keep_ratio(a_state(20, protected=(0, 1, 2)), 0.5) == 10


def test_positions_outside_units_are_charged_to_a_budget_of_units():
    units = ((range(2, 6), range(10, 14)),)
    state = a_state(20, protected=(3,), units=units)
    assert keep_ratio_of_units(state, 0.65) == 13  # 20 - 8 outside, and one protected inside
    with pytest.raises(Refused, match=r"12, but 13 are protected or in no unit.* 0\.65"):
        keep_ratio_of_units(state, 0.6)


def layers_of(budget, length, layers, ratio, protected=()):
    states = [a_state(length, layer=i, layers=layers, protected=protected) for i in range(layers)]
    return [budget(state, ratio) for state in states]


def test_a_pyramid_follows_the_published_code_where_it_applies():
    # C = 48, W = 8: base 40, min 40 // 20 = 2, max 2 * 40 - 2 = 78, step (78 - 2) // 4 = 19
    assert layers_of(pyramid(20, 8), 200, 5, 0.24) == [86, 67, 48, 29, 10]


def test_protected_positions_inside_the_window_are_held_once():
    inside = layers_of(pyramid(20, 8), 200, 5, 0.24, protected=(192, 199))
    assert inside == [86, 67, 48, 29, 10]


def test_a_first_layer_that_would_exceed_the_prompt_gets_the_prompt():
    # C = 24, W = 4: base 20, max 39 -> 30 - 4 = 26, min 2 * 20 - 26 = 14
    assert layers_of(pyramid(20, 4), 30, 3, 0.8) == [30, 24, 18]


def test_a_mean_that_cannot_hold_the_window_is_still_a_pyramid_over_what_is_protected():
    # C = 10 < W: 2 protected, base 8, min 0, max 16
    assert layers_of(pyramid(20, 32), 100, 3, 0.1, protected=(0, 99)) == [18, 10, 2]


def test_a_model_of_one_layer_gets_the_mean():
    assert layers_of(pyramid(20, 4), 30, 1, 0.5) == [15]


@given(
    length=st.integers(1, 60),
    layers=st.integers(2, 9),
    percent=PERCENT,
    beta=st.integers(1, 40),
    window=st.integers(1, 70),
    held=st.integers(0, 6),
)
def test_a_pyramid_falls_and_never_exceeds_the_mean(length, layers, percent, beta, window, held):
    protected = tuple(range(min(held, length)))
    try:
        budgets = layers_of(pyramid(beta, window), length, layers, percent / 100, protected)
    except Refused:
        assert max(1, percent * length // 100) < len(protected)
        return
    mean = max(1, percent * length // 100)
    assert budgets == sorted(budgets, reverse=True)
    assert layers * mean - layers < sum(budgets) <= layers * mean
    assert max(1, len(protected)) <= budgets[-1] <= budgets[0] <= length
    if beta > 1 and max(1, len(protected)) < mean < length:
        assert budgets[0] > budgets[-1]


@pytest.mark.parametrize(("beta", "window", "name"), [(0, 8, "beta"), (20, 0, "window")])
def test_a_pyramid_refuses_what_is_not_a_count(beta, window, name):
    with pytest.raises(
        InvalidArgument, match=f"{name} must be a whole number of at least 1, got 0"
    ):
        pyramid(beta, window)
