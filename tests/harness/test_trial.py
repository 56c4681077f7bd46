import pytest
from scipy.stats import binom

from pytest_kvguard.harness.trial import MARGIN, hopeless, unreadable


class Tokenizer:
    unk_token_id = 1


@pytest.mark.parametrize(("right", "n", "chance"), [(0, 20, 0.0), (5, 100, 0.0), (3, 24, 0.25)])
def test_a_model_that_surely_stays_near_guessing_is_hopeless(right, n, chance):
    reason = hopeless([1.0] * right + [0.0] * (n - right), chance)
    assert f"{right} of {n} answers" in reason
    assert binom.cdf(right, n, chance + MARGIN) < 0.05  # what the bound says, the other way round


@pytest.mark.parametrize(
    ("right", "n", "chance"), [(0, 18, 0.0), (2, 20, 0.0), (8, 24, 0.25), (9, 9, 0.5)]
)
def test_a_model_that_may_still_rise_above_guessing_is_not(right, n, chance):
    assert hopeless([1.0] * right + [0.0] * (n - right), chance) is None
    assert binom.cdf(right, n, chance + MARGIN) >= 0.05


def test_partial_marks_count_by_their_sum():
    assert hopeless([0.5] * 20, 0.0) is None
    assert hopeless([0.04] * 20, 0.0)


def test_a_text_of_unknown_words_is_not_read():
    assert "knows 50% of the tokens" in unreadable([[1, 2], [3, 1]], Tokenizer())
    assert unreadable([[2] * 19 + [1]], Tokenizer()) is None
    assert unreadable([[1, 2]], object()) is None
