"""When a baseline is given up: never too soon, and not much too late."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kvguard.harness.trial import ERROR, MARGIN, STAKES, Futility, unreadable

RUNS = 400
MARKS = {
    "right or wrong": lambda rng, mean, n: (rng.random((RUNS, n)) < mean).astype(float),
    "four questions each": lambda rng, mean, n: rng.binomial(4, mean, (RUNS, n)) / 4,
    "shares": lambda rng, mean, n: rng.beta(mean, 1 - mean, (RUNS, n)),
    "all alike": lambda rng, mean, n: np.full((RUNS, n), mean),
}


class Tokenizer:
    unk_token_id = 1


def given_up(futility, marks, looks):
    """Return the share of the runs that are given up at any of the looks."""
    return np.mean([any(futility.reason(run[:look].tolist()) for look in looks) for run in marks])


@pytest.mark.parametrize("chance", [0.0, 0.25])
@pytest.mark.parametrize("kind", MARKS)
def test_a_model_at_the_floor_is_given_up_seldom_however_often_one_looks(kind, chance):
    futility = Futility(100, chance)
    marks = MARKS[kind](np.random.default_rng(0), futility.floor, 100)
    assert given_up(futility, marks, range(1, 101)) <= ERROR + 3 * (ERROR / RUNS) ** 0.5


@pytest.mark.parametrize("chance", [0.0, 0.25])
@pytest.mark.parametrize("kind", MARKS)
def test_a_model_above_the_floor_is_hardly_ever_given_up(kind, chance):
    futility = Futility(100, chance)
    marks = MARKS[kind](np.random.default_rng(1), futility.floor + 0.15, 100)
    assert given_up(futility, marks, range(1, 101)) <= 0.01


@pytest.mark.parametrize("chance", [0.0, 0.25])
def test_a_model_that_gets_nothing_right_is_given_up_at_the_first_look(chance):
    futility = Futility(100, chance)
    wrong = [0.0] * futility.first_look
    assert futility.reason(wrong)
    assert futility.reason(wrong[1:]) is None
    assert futility.first_look <= {0.0: 22, 0.25: 7}[chance]


def test_a_model_that_guesses_is_mostly_given_up_before_its_run_ends():
    futility = Futility(200, 0.25)
    marks = MARKS["right or wrong"](np.random.default_rng(2), 0.25, 200)
    waves = [futility.first_look, 14, 28, 56, 112, 200]
    assert given_up(futility, marks, waves) > 0.9


def test_few_samples_ask_for_more_and_give_up_sooner():
    assert Futility(25).floor == 0.2  # five samples' worth
    assert Futility(25).first_look < Futility(100).first_look
    assert Futility(100).floor == MARGIN


@pytest.mark.parametrize(("samples", "chance"), [(1, 0.0), (5, 0.0), (100, 0.9)])
def test_a_run_that_can_show_nothing_anyway_gives_nobody_up(samples, chance):
    assert Futility(samples, chance).reason([0.0] * samples) is None
    assert Futility(samples, chance).first_look == samples


@given(st.lists(st.floats(0, 1), max_size=40), st.integers(1, 300), st.floats(0, 0.99), st.data())
def test_what_is_proved_does_not_hang_on_the_order_and_more_right_proves_less(
    marks, samples, chance, data
):
    futility = Futility(samples, chance)
    proved = futility.reason(marks) is not None
    shuffled = data.draw(st.permutations(marks))
    assert (futility.reason(shuffled) is not None) == proved
    if not proved:
        assert futility.reason([min(1.0, mark + 0.1) for mark in marks]) is None


def test_long_runs_neither_overflow_nor_forget():
    assert Futility(10**6, 0.5).reason([0.0] * 100_000)
    assert Futility(10**6, 0.5).reason([0.0] * 5000 + [1.0] * 10)
    assert Futility(10**6, 0.5).reason([1.0, 0.0] * 5000)  # half right, where 65 % is asked for
    assert Futility(10**6, 0.5).reason([1.0] * 10_000) is None


def test_the_reason_tells_what_was_seen_and_what_is_asked():
    reason = Futility(25).reason([0.5] + [0.0] * 24)
    assert "gets 0.5 of 25 answers right, at most 15.2% in the long run (95 %)" in reason
    assert "25 samples show a loss only from 20.0% up" in reason
    assert "against 25% by guessing" in Futility(100, 0.25).reason([0.0] * 20)


def test_all_of_the_wealth_is_staked_somehow():
    assert sum(share for _, share in STAKES) == pytest.approx(1)
    assert all(0 < stake <= 1 for stake, _ in STAKES)


def test_a_text_of_unknown_words_is_not_read():
    assert "knows 50% of the tokens" in unreadable([[1, 2], [3, 1]], Tokenizer())
    assert unreadable([[2] * 19 + [1]], Tokenizer()) is None
    assert unreadable([[1, 2]], object()) is None
