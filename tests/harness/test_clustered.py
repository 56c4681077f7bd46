"""Oracles: statsmodels, the effective number of its source, clusters added by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from benchmarks.error_rates import Setting, draw
from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.harness.clustered import Clusters, widest_limits
from pytest_kvguard.harness.score_test import Table, null_variance
from pytest_kvguard.harness.stats import (
    interval,
    relative_change,
    samples_needed,
    score_interval,
    smallest_drop_seen,
)

marks = st.sampled_from([0.0, 0.0, 0.25, 1.0, 1.0])
rows = st.lists(st.tuples(marks, marks, st.integers(0, 7)), min_size=3, max_size=40).filter(
    lambda found: any(base for base, _, _ in found)
)


def sample(seed=0, clusters=20, size=5, *, graded=False, loss=0.15):
    setting = Setting(clusters * size, size, icc=0.4, base=0.8, mended=0.1, graded=graded)
    return draw(np.random.default_rng(seed), setting, loss)


def ratio(base, kept):
    return 1 + relative_change(base, kept)


def variance(distance, labels=None):
    """Of the mean, by statsmodels: of independent samples, or of clusters; no correction."""
    how = (
        {"cov_type": "HC0"}
        if labels is None
        else {
            "cov_type": "cluster",
            "cov_kwds": {"groups": np.asarray(labels), "use_correction": False},
        }
    )
    return sm.OLS(distance, np.ones_like(distance)).fit(**how).cov_params()[0, 0]


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_design_effect_is_that_of_the_sandwich_of_statsmodels(seed, graded):
    base, kept, labels = sample(seed, graded=graded)
    theta = ratio(base, kept)  # where the mean distance is 0, as statsmodels takes it
    distance = kept - theta * base
    expected = variance(distance, labels) / variance(distance)
    assert Clusters.of(base, kept, labels).design_effect(theta) == pytest.approx(max(expected, 1))


def test_at_a_ratio_of_one_the_square_is_the_statistic_of_clustered_mcnemar():
    base, kept, labels = sample(3)
    lost = np.bincount(labels, (base > kept) * 1.0)
    gained = np.bincount(labels, (kept > base) * 1.0)
    expected = (gained - lost).sum() ** 2 / ((gained - lost) ** 2).sum()  # Durkalski et al., 2003
    effect = Clusters.of(base, kept, labels).design_effect(1.0)
    assert effect > 1
    square = (kept - base).sum() ** 2 / (null_variance(Table.of(base, kept), 1.0) * effect)
    assert square == pytest.approx(expected)


@pytest.mark.parametrize(("unseen", "mark"), [("lost", (1.0, 0.0)), ("gained", (0.0, 1.0))])
def test_an_unseen_cluster_is_one_more_of_the_same_size_that_changed_as_one(unseen, mark):
    base = np.array([1.0, 1, 1, 0, 0] * 6)
    kept = np.array([1.0] * 15 + [1.0, 0, 0, 0, 0] * 3)
    labels = np.repeat(np.arange(6), 5)
    more = np.where(np.arange(5) < 3, 1.0, 0.0)  # base and kept are right three times in five
    with_it = Clusters.of(
        np.r_[base, more * mark[0]], np.r_[kept, more * mark[1]], [*labels, *[6] * 5]
    )
    seen = Clusters.of(base, kept, labels)
    for theta in (0.5, 0.9, 1.2):
        assert seen.design_effect(theta, unseen=unseen) == pytest.approx(
            with_it.design_effect(theta)
        )
    assert seen.design_effect(0.9, unseen=unseen) > seen.design_effect(0.9)


def test_twice_as_many_clusters_are_the_clusters_twice():
    base, kept, labels = sample(4)
    once = Clusters.of(base, kept, labels)
    twice = Clusters.of(np.r_[base, base], np.r_[kept, kept], [*labels, *labels + 100])
    for unseen in (None, "lost", "gained"):
        assert once.design_effect(0.9, unseen=unseen, times=2) == pytest.approx(
            twice.design_effect(0.9, unseen=unseen)
        )
    assert once.quantile(0.95, times=2) == pytest.approx(twice.quantile(0.95))


def test_the_quantile_is_of_t_with_the_effective_number_of_clusters():
    sizes = np.array([1, 2, 3, 10])
    shares = sizes**2 / (sizes**2).sum() * len(sizes)  # of the variance, if each cluster is one
    expected = len(sizes) / (1 + shares.var())  # Carter, Schnepel and Steigerwald, 2017, eq. 5
    labels = np.repeat(np.arange(4), sizes)
    clusters = Clusters.of(np.ones(16), np.ones(16), labels)
    assert clusters.effective == pytest.approx(expected)
    assert clusters.quantile(0.95) == pytest.approx(student.ppf(0.95, expected - 1))
    alike = Clusters.of(np.ones(16), np.ones(16), np.repeat(np.arange(4), 4))
    assert alike.quantile(0.9) == pytest.approx(student.ppf(0.9, 3))


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_both_ends_are_where_the_statistic_meets_the_quantile(seed, graded):
    base, kept, labels = sample(seed, 60, graded=graded)
    clusters, n = Clusters.of(base, kept, labels), len(base)
    assert clusters.changed > 10
    low, high = interval(base, kept, clusters=labels)
    for end, unseen, sign in ((low, "lost", 1), (high, None, -1)):
        distance = kept - (1 + end) * base
        alone = (
            n * np.var(distance, ddof=1) if graded else null_variance(Table.of(base, kept), 1 + end)
        )
        statistic = distance.sum() / math.sqrt(
            alone * clusters.design_effect(1 + end, unseen=unseen)
        )
        assert statistic == pytest.approx(sign * student.ppf(0.95, 59), rel=1e-6)


@settings(deadline=None)
@given(rows, st.booleans())
def test_an_interval_of_clusters_contains_that_of_independent_samples(found, higher):
    base, kept, labels = (np.array(column) for column in zip(*found, strict=True))
    low, high = interval(base, kept)
    wide_low, wide_high = interval(base, kept, clusters=labels.tolist(), higher_is_better=higher)
    assert -1 <= wide_low <= low + 1e-9
    assert wide_high >= high - 1e-9 * (1 + abs(high))


@settings(deadline=None)
@given(rows)
def test_clusters_of_one_sample_change_nothing(found):
    base, kept, _ = (np.array(column) for column in zip(*found, strict=True))
    labels = [f"s{i}" for i in range(len(base))]
    assert interval(base, kept, clusters=labels) == interval(base, kept)
    assert smallest_drop_seen(base, kept, clusters=labels) == smallest_drop_seen(base, kept)
    assert samples_needed(base, kept, -0.1, clusters=labels) == samples_needed(base, kept, -0.1)


@settings(deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_neither_order_nor_names_of_clusters_matter(found, random):
    mixed = random.sample(found, len(found))
    ends = []
    for some, name in ((found, str), (mixed, lambda label: (label, "x"))):
        base, kept, labels = zip(*some, strict=True)
        ends.append(interval(base, kept, clusters=[name(label) for label in labels]))
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_swapping_the_runs_turns_the_ratio_and_the_wary_end_round():
    base, kept, labels = sample(5)
    low, high = interval(base, kept, clusters=labels)
    back_low, back_high = interval(kept, base, clusters=labels, higher_is_better=False)
    assert (1 + back_low, 1 + back_high) == pytest.approx((1 / (1 + high), 1 / (1 + low)))


def test_samples_that_are_copies_of_each_other_count_as_one():
    base, kept = np.r_[np.ones(28), 0, 0], np.r_[np.ones(20), np.zeros(9), 1]
    copies = [np.repeat(marks, 4) for marks in (base, kept)]
    low, high = interval(*copies, clusters=np.repeat(np.arange(30), 4).tolist())
    alone_low, alone_high = score_interval(base, kept, level=2 * student(29).cdf(0) - 0.1)
    assert low < alone_low
    assert alone_high < high < alone_high + 0.03  # t instead of the normal distribution


def test_clusters_in_which_nothing_changed_count_as_samples():
    ends = interval(np.ones(100), np.ones(100), clusters=np.repeat(np.arange(20), 5).tolist())
    t2 = student.ppf(0.95, 19) ** 2
    assert ends == pytest.approx((-t2 / (20 + t2), t2 / 20))


def test_clusters_that_all_lose_alike_leave_the_doubt_of_independent_samples():
    base, kept = np.ones(100), np.tile([1.0, 1, 1, 1, 0], 20)
    low, high = interval(base, kept, clusters=np.repeat(np.arange(20), 5).tolist())
    assert low < score_interval(base, kept)[0] < score_interval(base, kept)[1] < high < -0.1


def test_one_cluster_tells_nothing():
    base, kept, _ = sample(6)
    one = ["same"] * len(base)
    assert interval(base, kept, clusters=one) == (-1, math.inf)
    assert samples_needed(base, kept, -0.1, clusters=one) is None
    assert smallest_drop_seen(base, kept, clusters=one) == 1.0


def test_next_to_nothing_in_clusters_is_everything():
    tiny = [1e-12, 0.0, 5e-324]
    assert interval(tiny, tiny, clusters="aab") == (-1, math.inf)
    assert interval([1.0, 1.0, 0.0], tiny, clusters="aab")[0] == -1
    base, kept = [1.0] * 11 + [5e-324], [1.0] * 11 + [0.0]
    assert -1 < interval(base, kept, clusters="aabbccddeeff")[0] < 0


def test_a_statistic_that_is_small_again_farther_out_makes_no_hole():
    def falling(theta):
        return 0.5 if 0.3 < theta < 0.4 else 3 * (1 - theta)

    low, _ = widest_limits(falling, falling, quantile=1.0, observed=1.0)
    assert low == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize(("seed", "size"), [(1, 5), (2, 4)])
def test_the_samples_said_to_be_needed_decide_four_times_in_five(seed, size):
    setting = Setting(2000 * size, size, icc=0.4, base=0.9, mended=0.1)
    rng = np.random.default_rng(seed)
    base, kept, labels = draw(rng, setting, 0.03)
    n = samples_needed(base, kept, -0.10, clusters=labels.tolist())
    assert n > 1.5 * samples_needed(base, kept, -0.10)
    passed = []
    for _ in range(300):
        base, kept, labels = draw(rng, replace(setting, n=n), 0.03)
        passed.append(interval(base, kept, clusters=labels.tolist())[0] > -0.10)
    assert 0.7 < np.mean(passed) < 0.9


def test_a_drop_as_large_as_the_smallest_seen_is_mostly_seen():
    rng = np.random.default_rng(7)
    setting = Setting(200, 5, icc=0.4, base=0.7, mended=0.3)
    found = [draw(rng, setting, 0.2) for _ in range(50)]
    drop = np.mean([smallest_drop_seen(b, k, clusters=labels.tolist()) for b, k, labels in found])
    assert drop > 1.3 * np.mean([smallest_drop_seen(b, k) for b, k, _ in found])
    seen = []
    for _ in range(300):
        base, kept, labels = draw(rng, setting, drop)
        seen.append(interval(base, kept, clusters=labels.tolist())[1] < 0)
    assert 0.7 < np.mean(seen) < 0.95, drop


def test_labels_go_with_samples():
    with pytest.raises(InvalidArgument, match="got 2 samples and 1 clusters"):
        interval([1.0, 1.0], [1.0, 0.0], clusters=["a"])


def test_the_size_is_that_of_the_cluster_of_an_average_sample():
    labels = np.repeat(np.arange(4), [1, 2, 3, 10])
    seen = Clusters.of(np.ones(16), np.ones(16), labels)
    assert seen.size == np.mean(np.bincount(labels)[labels])


@pytest.mark.parametrize("clusters", [4, 90])
def test_samples_needed_without_a_change_is_what_the_interval_needs(clusters):
    def unchanged(number):
        return np.ones(5 * number), np.repeat(np.arange(number), 5).tolist()

    base, labels = unchanged(clusters)
    n = samples_needed(base, base, -0.10, clusters=labels)
    enough = math.ceil(n / 5)
    for number, passes in ((enough, True), (enough - 1, False)):
        base, labels = unchanged(number)
        assert (interval(base, base, clusters=labels)[0] > -0.10) is passes


@pytest.mark.parametrize(("loss", "limit"), [(0.0, -0.2), (0.2, -0.1)])
def test_more_samples_prove_a_loss_harmless_than_prove_it(loss, limit):
    base, kept, labels = draw(np.random.default_rng(8), Setting(100, 5, 0.1, 0.8, 0.1), loss)
    harmless, harm = (
        samples_needed(base, kept, limit, clusters=labels.tolist(), higher_is_better=higher)
        for higher in ((True, False) if relative_change(base, kept) > limit else (False, True))
    )
    assert harmless > harm


def test_samples_needed_are_those_whatever_number_of_like_clusters_was_seen():
    base, kept, labels = draw(np.random.default_rng(9), Setting(60, 5, 0.1, 0.8, 0.1), 0.0)
    once = samples_needed(base, kept, -0.2, clusters=labels.tolist())
    thrice = samples_needed(
        np.tile(base, 3), np.tile(kept, 3), -0.2, clusters=[*labels, *labels + 50, *labels + 99]
    )
    assert thrice == pytest.approx(once, rel=0.02)


@pytest.mark.parametrize(("contexts", "passes"), [(26, False), (27, True)])
def test_twenty_seven_contexts_without_a_change_pass_at_a_tenth(contexts, passes):
    labels = np.repeat(np.arange(contexts), 5).tolist()
    same = np.ones(len(labels))
    assert (interval(same, same, clusters=labels)[0] > -0.10) is passes


@pytest.mark.parametrize(
    ("losses", "changed"), [([0.5] * 8, 8), ([0.5] * 3 + [0] * 5, 3), ([0] * 8, 0), ([2, 1], 1.8)]
)
def test_clusters_that_changed_are_counted_by_how_much(losses, changed):
    losses = np.array(losses) / 2
    labels = np.repeat(np.arange(len(losses)), 2)
    base = np.ones(len(labels))
    kept = base - losses[labels]
    assert Clusters.of(base, kept, labels).changed == pytest.approx(changed)


@pytest.mark.parametrize(("changed", "few"), [(9, True), (11, False)])
def test_fractions_that_changed_in_few_clusters_prove_no_more_than_the_score_test(changed, few):
    base, labels = np.full(200, 0.8), np.repeat(np.arange(40), 5)
    kept = base - np.where(labels < changed, 0.04, 0.0)
    low, high = interval(base, kept, clusters=labels.tolist())
    clusters = Clusters.of(base, kept, labels)
    for end, unseen, coin in ((low, "lost", few), (high, None, False)):
        distance = kept - (1 + end) * base
        alone = (
            null_variance(Table.of(base, kept), 1 + end) if coin else 200 * np.var(distance, ddof=1)
        )
        error = math.sqrt(alone * clusters.design_effect(1 + end, unseen=unseen))
        assert abs(distance.sum() / error) == pytest.approx(student.ppf(0.95, 39), rel=1e-6)
