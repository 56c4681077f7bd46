"""Oracles: statsmodels, published examples, likelihoods on a grid, formulas worked by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import norm, ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.proportion import _confint_riskratio_paired_nam

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.harness.stats import (
    fieller_interval,
    interval,
    mcnemar,
    relative_change,
    samples_needed,
    score_interval,
    smallest_drop_seen,
    too_weak,
)

Z = 1.6448536269514722  # of the standard normal, 95 %


def pairs(both, broke, mended, neither=0):
    """Scores of a two by two table: right in both runs, only at baseline, only kept, in none."""
    base = [1.0] * (both + broke) + [0.0] * (mended + neither)
    kept = [1.0] * both + [0.0] * broke + [1.0] * mended + [0.0] * neither
    return np.array(base), np.array(kept)


def drawn(rng, n, right, broken, mended):
    """Draw n pairs: right at baseline, broken of those, mended of the others."""
    base = rng.random(n) < right
    flip = rng.random(n)
    kept = np.where(base, flip >= broken, flip < mended)
    return base.astype(float), kept.astype(float)


counts = st.integers(0, 40)
tables = st.tuples(counts, counts, counts, counts).filter(lambda t: t[0] + t[1] > 0)
marks = st.integers(0, 16).map(lambda i: i / 16)
score_pairs = st.lists(st.tuples(marks, marks), min_size=1, max_size=40).filter(
    lambda rows: any(b for b, _ in rows)
)


def test_dp_is_relative_to_the_baseline():
    assert relative_change([0.8, 0.8], [0.6, 0.6]) == pytest.approx(-0.25)
    assert relative_change([1, 0, 0, 0], [1, 1, 0, 0]) == 1.0


def test_a_drop_of_exactly_the_limit_is_exactly_the_limit():
    for right, broke in itertools.product(range(1, 200), range(20)):
        if broke <= right:
            assert relative_change(*pairs(right - broke, broke, 0, 7)) == -broke / right


@pytest.mark.parametrize(
    ("table", "level", "expected"),
    [
        # Tang, Tang and Chan 2003: soft contact lenses, and two tests for one antibody
        ((43, 1, 0, 0), 0.90, (0.904, 1.039)),
        ((446, 16, 5, 690), 0.90, (0.959, 0.992)),
        # Fagerland, Lydersen and Laake 2014: airways before and after a transplantation
        ((1, 7, 1, 12), 0.95, (0.065, 0.907)),
    ],
)
def test_score_interval_gives_the_published_examples(table, level, expected):
    low, high = score_interval(*pairs(*table), level=level)
    assert (low + 1, high + 1) == pytest.approx(expected, abs=1.0e-3)


@settings(deadline=None)
@given(
    st.tuples(*[st.integers(1, 60)] * 3, st.integers(0, 60)),
    st.sampled_from([0.8, 0.9, 0.95, 0.99]),
)
def test_score_interval_agrees_with_the_quartic_of_statsmodels(table, level):
    both, broke, mended, neither = table
    roots = _confint_riskratio_paired_nam([both, mended, broke, neither], alpha=1 - level).p_roots
    low, high = score_interval(*pairs(*table), level=level)
    assert (low + 1, high + 1) == pytest.approx((min(roots), max(roots)), rel=1e-7)


def likeliest(table, theta, zooms=9, points=41):
    """Maximise the likelihood of a table with kept = theta * base over a grid, by brute force.

    Returns p10 and p01. Free: p11 and p10; p01 follows from theta, p00 from the sum.
    """
    n11, n10, n01, n00 = table
    low, high = np.zeros(2), np.ones(2)
    for _ in range(zooms):
        best = (-math.inf, 0.0, 0.0, 0.0)
        for p11 in np.linspace(low[0], high[0], points):
            for p10 in np.linspace(low[1], high[1], points):
                p01 = theta * (p11 + p10) - p11
                cells = (p11, p10, p01, 1 - p11 - p10 - p01)
                if min(cells) < 0:
                    continue
                terms = [
                    n * math.log(p) if p else -math.inf
                    for n, p in zip((n11, n10, n01, n00), cells, strict=True)
                    if n
                ]
                best = max(best, (sum(terms), p11, p10, p01))
        middle, reach = np.array(best[1:3]), (high - low) / 6
        low, high = np.maximum(middle - reach, 0), np.minimum(middle + reach, 1)
    return best[2], best[3]


@pytest.mark.parametrize(
    "table", [(20, 6, 2, 5), (9, 5, 0, 3), (12, 0, 4, 6), (30, 3, 3, 0), (4, 9, 7, 2)]
)
def test_the_score_statistic_at_both_ends_is_the_normal_quantile(table):
    both, broke, mended, _ = table
    n = sum(table)
    low, high = score_interval(*pairs(*table))
    for theta, expected in ((1 + low, Z), (1 + high, -Z)):
        p10, p01 = likeliest(table, theta)
        distance = (both + mended) - theta * (both + broke)
        assert distance / math.sqrt(n * theta * (p10 + p01)) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("n", [1, 4, 30, 500])
def test_samples_that_never_change_still_leave_doubt(n):
    base, kept = pairs(n, 0, 0, 3)
    assert score_interval(base, kept) == pytest.approx((-(Z**2) / (n + Z**2), Z**2 / n))


@pytest.mark.parametrize("n", [1, 4, 30])
def test_nothing_right_any_more_reaches_down_to_a_total_loss(n):
    assert score_interval(*pairs(0, n, 0, 2)) == pytest.approx((-1, Z**2 / n - 1))


@settings(deadline=None)
@given(tables, st.integers(1, 50))
def test_samples_wrong_in_both_runs_change_no_score_interval(table, more):
    both, broke, mended, neither = table
    few = score_interval(*pairs(both, broke, mended, neither))
    many = score_interval(*pairs(both, broke, mended, neither + more))
    assert few == many


@settings(deadline=None)
@given(score_pairs)
def test_dp_lies_within_the_interval(rows):
    base, kept = np.array(rows).T
    low, high = interval(base, kept)
    assert low >= -1
    assert low - 1e-9 <= relative_change(base, kept) <= high + 1e-9


@settings(deadline=None)
@given(tables)
def test_swapping_the_runs_turns_the_ratio_round(table):
    both, broke, mended, neither = table
    assume(both + mended > 0)
    low, high = score_interval(*pairs(both, broke, mended, neither))
    back_low, back_high = score_interval(*pairs(both, mended, broke, neither))
    assert 1 + back_low == pytest.approx(1 / (1 + high), rel=1e-9)
    if low > -1:
        assert 1 + back_high == pytest.approx(1 / (1 + low), rel=1e-9)


@settings(deadline=None)
@given(score_pairs, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_changes_nothing(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert interval(*np.array(rows).T) == pytest.approx(interval(*np.array(shuffled).T))


@settings(deadline=None)
@given(score_pairs)
def test_a_higher_level_never_narrows_the_interval(rows):
    base, kept = np.array(rows).T
    low, high = interval(base, kept, level=0.8)
    wide_low, wide_high = interval(base, kept, level=0.95)
    assert wide_low <= low + 1e-9
    assert high - 1e-9 <= wide_high


def test_a_fraction_counts_as_that_fraction_of_a_sample():
    halves = score_interval(np.full(40, 0.5), np.r_[np.full(36, 0.5), np.zeros(4)])
    assert halves == pytest.approx(score_interval(*pairs(18, 2, 0)))


def test_a_baseline_of_almost_nothing_has_a_wide_interval_not_a_crash():
    low, high = interval([1e-9, 0], [1, 1])
    assert low < 0 < 2e9 - 1 < high


def test_fieller_interval_inverts_the_paired_t_test():
    rng = np.random.default_rng(1)
    base = rng.beta(4, 2, 60)
    kept = np.clip(base - rng.normal(0.05, 0.1, 60), 0, 1)
    low, high = fieller_interval(base, kept, level=0.90)
    assert ttest_1samp(kept - (1 + low) * base, 0, alternative="greater").pvalue == pytest.approx(
        0.05
    )
    assert ttest_1samp(kept - (1 + high) * base, 0, alternative="less").pvalue == pytest.approx(
        0.05
    )


def test_fieller_interval_of_a_baseline_like_zero_is_everything():
    assert fieller_interval([0.9, 0, 0, 0], [0.8, 0, 0, 0]) == (-1, math.inf)
    assert fieller_interval([0.9], [0.9]) == (-1, math.inf)


def test_fieller_interval_needs_no_more_than_two_samples():
    low, high = fieller_interval([1.0, 1.0], [0.9, 0.8])
    assert -1 < low < -0.15 < high < math.inf


def test_an_interval_of_next_to_nothing_is_everything():
    tiny = [1e-12, 0.0, 5e-324]
    assert score_interval(tiny, tiny) == (-1, math.inf)
    low, high = score_interval([1.0, 1.0, 0.0], tiny)
    assert (low, high) == score_interval([1.0, 1.0, 0.0], [0.0] * 3)


def test_fieller_interval_stops_at_a_total_loss():
    base, kept = np.full(12, 0.6), np.r_[np.full(11, 0.001), 0.3]
    assert fieller_interval(base, kept)[0] == -1


def test_scores_of_zero_and_one_go_by_the_score_test():
    base, kept = pairs(50, 12, 5, 10)
    assert interval(base, kept) == score_interval(base, kept)


def test_fractional_scores_go_by_fieller_once_ten_samples_changed():
    base = np.linspace(0.4, 0.9, 30)
    nine, ten = base.copy(), base.copy()
    nine[:9] *= 0.5
    ten[:10] *= 0.5
    assert interval(base, nine) == score_interval(base, nine) != fieller_interval(base, nine)
    assert interval(base, ten) == fieller_interval(base, ten) != score_interval(base, ten)


def test_identical_fractional_runs_are_not_called_certain():
    base = np.linspace(0.4, 0.9, 30)
    low, high = interval(base, base)
    assert low < -0.1
    assert high > 0.1


@pytest.mark.parametrize("n", [30, 100])
@pytest.mark.parametrize(("right", "broken", "mended"), [(0.6, 0.2, 0.1), (0.9, 0.13, 0.3)])
def test_score_interval_misses_the_truth_on_either_side_about_one_time_in_twenty(
    n, right, broken, mended
):
    rng = np.random.default_rng(7)
    truth = (right * (1 - broken) + (1 - right) * mended) / right - 1
    found = [score_interval(*drawn(rng, n, right, broken, mended)) for _ in range(1500)]
    too_high = np.mean([low > truth for low, _ in found])
    too_low = np.mean([high < truth for _, high in found])
    assert 0.025 < too_high < 0.07  # a false pass with the limit at the truth
    assert 0.025 < too_low < 0.07  # a false fail


def test_fractional_interval_misses_the_truth_on_either_side_about_one_time_in_twenty():
    rng = np.random.default_rng(7)
    low_misses, high_misses, repeats = 0, 0, 1500
    for _ in range(repeats):
        base = rng.beta(3, 2, 50)
        kept = base * rng.beta(9, 1, 50)  # nine tenths of it in the mean
        low, high = interval(base, kept)
        low_misses += low > -0.1
        high_misses += high < -0.1
    assert 0.02 < low_misses / repeats < 0.09
    assert 0.02 < high_misses / repeats < 0.09


@pytest.mark.parametrize("table", [(95, 5, 3, 47), (88, 10, 4, 48), (28, 1, 1, 5)])
def test_the_samples_said_to_be_needed_decide_four_times_in_five(table):
    both, broke, mended, neither = table
    n = samples_needed(*pairs(*table), -0.10)
    right, wrong = both + broke, mended + neither
    shares = right / sum(table), broke / right, mended / wrong
    rng = np.random.default_rng(3)
    passed = [interval(*drawn(rng, n, *shares))[0] > -0.10 for _ in range(600)]
    assert 0.74 < np.mean(passed) < 0.88


def test_samples_needed_for_fractional_scores_come_from_the_paired_variance():
    rng = np.random.default_rng(2)
    base = rng.beta(4, 2, 60)
    kept = np.clip(base - rng.normal(0.03, 0.1, 60), 0, 1)
    distance = kept - 0.9 * base
    z = norm.ppf(0.95) + norm.ppf(0.8)
    expected = z**2 * np.var(distance, ddof=1) / np.mean(distance) ** 2
    assert samples_needed(base, kept, -0.1) == math.ceil(expected)


def test_samples_needed_without_a_change_is_what_the_score_test_needs():
    n = samples_needed(np.ones(10), np.ones(10), -0.10)
    assert score_interval(np.ones(n), np.ones(n))[0] > -0.10
    assert score_interval(np.ones(n - 1), np.ones(n - 1))[0] < -0.10


def test_no_number_of_samples_tells_a_drop_from_itself():
    assert samples_needed(*pairs(45, 5, 0), -0.1) is None


def test_a_drop_as_large_as_the_smallest_seen_is_mostly_seen():
    base, kept = pairs(60, 10, 10, 20)  # a fifth of the samples moves, none lost on balance
    drop = smallest_drop_seen(base, kept)
    rng = np.random.default_rng(5)
    right, moving = 0.7, 0.2
    broken = (moving + drop * right) / 2 / right
    mended = (moving - drop * right) / 2 / (1 - right)
    seen = [interval(*drawn(rng, 100, right, broken, mended))[1] < 0 for _ in range(400)]
    assert 0.7 < np.mean(seen) < 0.9  # planned for 0.8


def test_smallest_drop_seen_is_not_zero_when_nothing_changed():
    assert smallest_drop_seen(np.ones(20), np.ones(20)) == pytest.approx(Z**2 / (20 + Z**2))


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_exact_one_of_statsmodels(broke, mended):
    expected = statsmodels_mcnemar([[5, broke], [mended, 5]], exact=True).pvalue
    assert mcnemar(broke, mended) == pytest.approx(min(expected, 1))


def test_a_baseline_at_chance_is_too_weak():
    base = pairs(31, 0, 0, 69)[0]
    tail = sum(math.comb(100, k) * 0.25**k * 0.75 ** (100 - k) for k in range(31, 101))
    assert tail > 0.05
    assert f"may be luck (p = {tail:.2f})" in too_weak(base, 0.25)
    assert "may be luck (p = 0.07)" in too_weak(pairs(32, 0, 0, 68)[0], 0.25)
    assert too_weak(pairs(34, 0, 0, 66)[0], 0.25) is None  # p = 0.03


def test_a_baseline_above_chance_by_fewer_than_five_samples_is_too_weak():
    assert "4.0 samples above chance, fewer than 5" in too_weak(pairs(4, 0, 0, 96)[0], 0.0)
    assert too_weak(pairs(5, 0, 0, 95)[0], 0.0) is None


def test_a_fractional_baseline_is_held_against_chance_by_a_t_test():
    base = np.tile([0.1, 0.9], 60) + 0.045
    assert ttest_1samp(base, 0.5, alternative="greater").pvalue > 0.05
    assert "may be luck" in too_weak(base, 0.5)
    assert too_weak(base, 0.4) is None
    assert too_weak(np.full(20, 0.8), 0.5) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relative_change([0, 0], [1, 1]), "scores 0 on all 2 samples"),
        (lambda: relative_change([1, 1], [1]), "got 2 of the baseline and 1 kept"),
        (lambda: interval([], []), r"at least one score, got \(0,\)"),
        (lambda: interval([[1.0]], [[1.0]]), r"at least one score, got \(1, 1\)"),
        (lambda: interval([1.0], [1.5]), r"kept must hold scores in \[0, 1\], got 1.5"),
        (lambda: interval([math.nan], [1.0]), r"base must hold scores in \[0, 1\], got nan"),
        (lambda: interval([1.0], [1.0], level=95), r"level must be in \(0, 1\), got 95"),
        (lambda: samples_needed([1], [1], -1.0), "limit must be above -1, a total loss, got -1.0"),
        (lambda: mcnemar(-1, 2), "must be >= 0, got -1 and 2"),
        (lambda: too_weak([1.0], 1.0), r"chance must be in \[0, 1\), got 1.0"),
    ],
)
def test_unusable_arguments_are_named(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()
