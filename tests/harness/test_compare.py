import dataclasses
import math
import re

import pytest

from pytest_kvguard.errors import InvalidArgument, Refused
from pytest_kvguard.harness import stats
from pytest_kvguard.harness.records import Answer, Counts
from tests.runs import base, compare, five_each, kept


def test_a_comparison_is_one_line_that_says_what_was_lost():
    assert repr(compare()) == (
        "<retrieval snapkv@0.25: 0.960 -> 0.940, dP -2.1% [-8.8%, +3.6%], "
        "1 broke, 0 mended, 24% held: pass>"
    )


def test_the_parameters_of_the_policy_are_shown():
    assert repr(compare(after=kept(params={"window": 16}))).startswith(
        "<retrieval snapkv(window=16)@0.25: "
    )


def test_a_bare_assert_on_dp_explains_itself():
    c = compare(after=kept(20))
    with pytest.raises(AssertionError, match=r"0\.960 -> 0\.400, dP -58\.3% .* 28 broke, .*>\.dp"):
        assert c.dp >= -0.3


def test_a_bare_assert_on_holds_explains_itself():
    c = compare(after=kept(20))
    with pytest.raises(AssertionError, match=r"where False = <retrieval snapkv@0\.25: .*: fail>\."):
        assert c.holds


def test_scores_are_paired_by_sample_not_by_place():
    shuffled = dict(reversed(kept(40).scores.items()))
    c = compare(after=kept(scores=shuffled))
    assert c.dp == -8 / 48
    assert c.interval == compare(after=kept(40)).interval
    assert c.broke == tuple(f"s{i}" for i in range(40, 48))
    assert c.mended == ()


def test_mended_samples_are_named():
    c = compare(base(10), kept(12))
    assert c.mended == ("s10", "s11")
    assert c.broke == ()


def test_the_interval_is_the_paired_one_at_its_level():
    c = compare(level=0.8)
    marks = list(base().scores.values()), list(kept().scores.values())
    assert c.interval == stats.score_interval(*marks, level=0.8)
    assert c.interval != stats.score_interval(*marks, level=0.9)


@pytest.mark.parametrize(
    ("right", "max_drop", "verdict"),
    [
        (47, 0.10, "pass"),  # interval from -8.8 %
        (47, 0.08, "inconclusive"),
        (46, 0.10, "inconclusive"),  # dP -4.2 %
        (42, 0.10, "inconclusive"),  # dP -12.5 %
        (20, 0.46, "fail"),  # interval up to -46.5 %
        (20, 0.47, "inconclusive"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(right, max_drop, verdict):
    assert compare(after=kept(right), max_drop=max_drop).verdict == verdict


@pytest.mark.parametrize(
    ("right", "gate", "proved", "regression"),
    [
        (47, True, True, True),  # pass
        (46, True, False, True),  # inconclusive, within the limit
        (42, False, False, True),  # inconclusive, past the limit
        (20, False, False, False),  # fail
    ],
)
def test_what_holds_depends_on_the_mode(right, gate, proved, regression):
    c = compare(after=kept(right))
    assert dataclasses.replace(c, mode="gate").holds is gate
    assert dataclasses.replace(c, mode="proved").holds is proved
    assert dataclasses.replace(c, mode="regression").holds is regression
    assert c.mode == "gate"


def test_a_drop_of_exactly_the_limit_is_within_it():
    c = compare(base(10, 20), kept(9, 20), max_drop=0.1)
    assert (c.dp, c.verdict, c.holds) == (-0.1, "inconclusive", True)


@pytest.mark.parametrize(("right", "holds"), [(901, True), (900, True), (899, False), (890, False)])
def test_the_gate_lets_through_not_one_sample_more_than_the_limit(right, holds):
    c = compare(base(1000, 1000), kept(right, 1000), max_drop=0.1)
    assert (c.verdict, c.holds) == ("inconclusive", holds)


def test_a_verdict_changes_where_the_limit_meets_the_end_of_the_interval():
    c = compare(after=kept(20))
    worst, best = (-end for end in c.interval)
    for limit, verdict in (
        (math.nextafter(worst, 1), "pass"),
        (worst, "inconclusive"),
        (best, "inconclusive"),
        (math.nextafter(best, 0), "fail"),
    ):
        assert dataclasses.replace(c, max_drop=limit).verdict == verdict


def test_a_baseline_at_chance_is_a_weakness_and_proves_nothing():
    c = compare(base(13, chance=0.25), kept(13))
    assert c.weakness == c.reason == stats.too_weak(list(base(13).scores.values()), 0.25)
    assert c.verdict == "refused"
    assert not c.holds
    assert c.dp == 0
    assert repr(c).endswith(f"24% held: refused: {c.weakness}>")


def test_a_baseline_that_scores_nothing_is_a_weakness_and_has_no_dp():
    c = compare(base(0), kept(0))
    assert c.refusal is None
    assert c.weakness
    assert c.verdict == "refused"
    with pytest.raises(Refused, match="stronger model"):
        assert c.dp == 0
    assert repr(c).endswith(f"refused: {c.weakness}>")


def test_a_limit_that_guessing_would_pass_is_a_weakness():
    c = compare(base(40, 100, chance=0.25), kept(26, 100), max_drop=0.4)
    assert "guessing scores 0.250" in c.weakness
    assert not c.holds
    assert compare(base(40, 100, chance=0.25), kept(26, 100), max_drop=0.3).weakness is None


def test_a_limit_that_ends_where_guessing_does_is_a_weakness_too():
    weak = compare(base(50, 100, chance=0.25), kept(50, 100), max_drop=0.5)
    assert "guessing scores 0.250" in weak.weakness
    assert dataclasses.replace(weak, max_drop=0.49).weakness is None


def test_answers_that_hang_on_rounding_are_told():
    assert "2 baseline answers hang on rounding" in compare(base(40, disagreements=2)).reason


def test_a_fail_says_what_was_lost():
    assert compare(after=kept(20)).reason == (
        "dP -58.3% [-69.3%, -46.5%] lies below the limit -10.0%: 28 broke, 0 mended"
    )


def test_an_inconclusive_comparison_says_how_many_samples_would_decide():
    c = compare(after=kept(46))
    needed = stats.samples_needed(
        list(base().scores.values()), list(kept(46).scores.values()), -0.1
    )
    assert 90 < needed <= c.samples_needed < needed + 10
    assert c.reason == (
        "n = 50 cannot decide: the limit -10.0% lies within dP -4.2% [-11.8%, +1.5%]; "
        f"about {c.samples_needed} samples would decide; 50 samples show drops from about 7% up"
    )


def test_a_drop_at_the_limit_promises_no_number_of_samples():
    c = compare(base(50), kept(45), max_drop=0.1)
    assert c.samples_needed is None
    assert "would decide" not in c.reason


def test_a_pass_has_nothing_to_explain():
    assert compare().reason == ""


def test_as_good_as_the_full_cache_is_not_suspicious():
    c = compare(base(1000, 1000), kept(1000, 1000))
    assert -0.003 < c.interval[0] < 0
    assert c.reason == ""


def test_better_than_the_full_cache_is_suspicious():
    c = compare(base(30), kept(45))
    assert c.verdict == "pass"
    assert "better than the full cache, 0 broke, 15 mended (p = 6.1e-05)" in c.reason


def test_answers_truncated_more_often_than_at_baseline_are_reported():
    cut, whole = Answer("a", 9, stopped=False), Answer("b", 3, stopped=True)
    before, after = base(answers={"s00": cut, "s01": whole}), kept(answers={"s00": cut, "s01": cut})
    assert compare(before, after).reason == "2 answers truncated, 1 at baseline"
    assert compare(before, kept(answers=before.answers)).reason == ""


def test_answers_that_loop_more_often_than_at_baseline_are_reported():
    loop, cut = Answer("a", 9, stopped=False, looped=True), Answer("b", 9, stopped=False)
    before, after = (
        base(answers={"s00": loop, "s01": cut}),
        kept(answers={"s00": loop, "s01": loop}),
    )
    assert compare(before, after).reason == "2 answers looped, 1 at baseline"
    assert before.endings == {"ended": 0, "truncated": 1, "looped": 1}


class TestSamplesThatShareAContext:
    """50 samples, five to a context."""

    @staticmethod
    def compared(right=47, clusters=None, before=48, **limits):
        shared = five_each() if clusters is None else clusters
        return compare(base(before, clusters=shared), kept(right, clusters=shared), **limits)

    def test_the_interval_is_that_of_clusters(self):
        c = self.compared(40)
        marks = list(base().scores.values()), list(kept(40).scores.values())
        labels = [i // 5 for i in range(50)]
        assert c.interval == stats.interval(*marks, clusters=labels)
        assert c.interval[0] < compare(after=kept(40)).interval[0]
        assert c.interval[1] > compare(after=kept(40)).interval[1]

    def test_what_independent_samples_prove_they_do_not(self):
        assert compare().verdict == "pass"
        assert self.compared().verdict == "inconclusive"
        assert compare(after=kept(35), max_drop=0.15).verdict == "fail"
        assert self.compared(35, max_drop=0.15).verdict == "inconclusive"

    def test_the_reason_says_how_many_contexts_there_are(self):
        c = self.compared()
        assert c.clusters == 10
        assert c.reason.startswith("n = 50 in 10 contexts cannot decide: the limit -10.0%")
        assert f"about {c.samples_needed} samples, as many to a context, would decide" in c.reason
        assert self.compared(10).reason.endswith("38 broke, 0 mended, n = 50 in 10 contexts")

    def test_more_samples_are_needed_and_only_larger_drops_are_seen(self):
        shared, alone = self.compared(46), compare(after=kept(46))
        assert shared.samples_needed > 2 * alone.samples_needed
        assert "50 samples show drops from about 7% up" in alone.reason
        assert re.search("50 samples show drops from about [23][0-9]% up", shared.reason)

    def test_one_context_decides_nothing_and_says_why(self):
        one = self.compared(0, dict.fromkeys(five_each(), "s00"))
        assert one.interval == (-1, math.inf)
        assert (one.clusters, one.verdict, one.samples_needed) == (1, "inconclusive", None)
        assert one.reason == (
            "n = 50 in 1 context cannot decide, whatever they score: what another would have lost "
            "does not show; use samples of several contexts"
        )
        assert not one.holds  # the gate still sees what was observed
        assert dataclasses.replace(one, kept=kept(48, clusters=one.base.clusters)).holds

    def test_contexts_of_one_sample_change_nothing(self):
        c = self.compared(46, {sample: sample for sample in five_each()})
        assert (c.interval, c.reason) == (
            compare(after=kept(46)).interval,
            compare(after=kept(46)).reason,
        )

    def test_a_sample_without_a_label_is_on_its_own(self):
        some = {"s00": "s01", "s01": "s01"}
        assert self.compared(46, some).clusters == 49

    def test_no_odds_are_given_that_hold_for_independent_samples_only(self):
        c = self.compared(before=20, right=50)
        assert "better than the full cache, 0 broke, 30 mended: look" in c.reason

    def test_of_the_fewer_the_better_the_end_above_is_the_wary_one(self):
        shared = {"clusters": five_each()}
        c = compare(base(20, higher_is_better=False, **shared), kept(20, **shared))
        low, high = stats.interval(
            *[list(run.scores.values()) for run in (c.base, c.kept)],
            clusters=[i // 5 for i in range(50)],
            higher_is_better=False,
        )
        assert c.interval == (-high, -low)
        assert -c.interval[0] > c.interval[1]


class TestTheFewerTheBetter:
    """Leaks: 20 of 50 at baseline."""

    def test_dp_is_negative_when_the_score_grows(self):
        c = compare(base(20, higher_is_better=False), kept(25))
        assert c.dp == -0.25
        assert c.broke == ("s20", "s21", "s22", "s23", "s24")
        assert c.mended == ()

    def test_the_interval_is_turned_round(self):
        c = compare(base(20, higher_is_better=False), kept(25))
        marks = list(base(20).scores.values()), list(kept(25).scores.values())
        low, high = stats.score_interval(*marks)
        assert c.interval == (-high, -low)
        assert c.interval[0] < c.dp < c.interval[1]

    def test_growth_past_the_limit_fails_and_shrinking_passes(self):
        assert compare(base(20, higher_is_better=False), kept(40)).verdict == "fail"
        assert compare(base(20, higher_is_better=False), kept(5)).verdict == "pass"

    def test_samples_needed_looks_at_the_limit_above(self):
        c = compare(base(20, higher_is_better=False), kept(21))
        marks = list(base(20).scores.values()), list(kept(21).scores.values())
        assert c.verdict == "inconclusive"
        assert abs(c.samples_needed - stats.samples_needed(*marks, +0.10)) <= 10

    def test_a_baseline_without_a_leak_says_how_to_turn_the_score(self):
        c = compare(base(0, higher_is_better=False), kept(5))
        assert "score the opposite, 1 - score" in c.reason

    def test_chance_does_not_make_it_weak(self):
        assert compare(base(20, higher_is_better=False, chance=0.9), kept(20)).weakness is None


@pytest.mark.parametrize("max_drop", [-0.1, 1.0, math.nan])
def test_a_limit_that_nothing_or_everything_passes_is_not_taken(max_drop):
    with pytest.raises(InvalidArgument, match=rf"max_drop must be in \[0, 1\), got {max_drop}"):
        compare(max_drop=max_drop)


def test_a_level_is_a_fraction():
    with pytest.raises(InvalidArgument, match=r"level must be in \(0, 1\), got 90"):
        compare(level=90)


def test_an_unknown_mode_is_not_taken():
    with pytest.raises(InvalidArgument, match=r"one of .*'gate', 'proved', .* got 'strict'"):
        compare(mode="strict")


@pytest.mark.parametrize("chance", [-0.1, 1.0, math.nan])
def test_a_run_takes_no_chance_that_leaves_nothing_to_score(chance):
    with pytest.raises(
        InvalidArgument, match=rf"guessing scores must be in \[0, 1\), got {chance}"
    ):
        base(chance=chance)


@pytest.mark.parametrize("score", [-0.1, 1.1, math.nan])
def test_a_run_takes_no_score_outside_its_range(score):
    with pytest.raises(InvalidArgument, match=rf"sample 'x' must be in \[0, 1\], got {score}"):
        base(scores={"x": score})


@pytest.mark.parametrize("ratio", [0.0, 1.5, math.nan])
def test_a_run_takes_no_ratio_outside_its_range(ratio):
    with pytest.raises(InvalidArgument, match=rf"keep ratio must be in \(0, 1\], got {ratio}"):
        kept(ratio=ratio)


def test_counts_add_up():
    assert Counts(1, 2, 3, 4) + Counts(10, 20, 30, 40) == Counts(11, 22, 33, 44)
    assert sum([Counts(1, 2, 3)] * 2, Counts()) == Counts(2, 4, 6)
