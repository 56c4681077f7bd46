import dataclasses
import math

import pytest

from pytest_kvguard.errors import InvalidArgument, Refused
from pytest_kvguard.harness import stats
from pytest_kvguard.harness.compare import Comparison
from pytest_kvguard.harness.records import FULL, Answer, Counts, Held, Run

QUARTER = Held(0.2, 0.24, 0.25)


def scores(right, n=50):
    """The first samples right, the rest wrong; named s00, s01, ..."""
    return {f"s{i:02}": float(i < right) for i in range(n)}


def base(right=48, n=50, **changes):
    run = Run("retrieval", FULL, {}, 1.0, "prompt", scores(right, n), bytes_full=80, bytes_held=80)
    return dataclasses.replace(run, **changes)


def kept(right=47, n=50, **changes):
    run = Run(
        *("retrieval", "snapkv", {}, 0.25, "prompt"),
        scores(right, n),
        held=QUARTER,
        bytes_full=80,
        bytes_held=20,
    )
    return dataclasses.replace(run, **changes)


def compare(before=None, after=None, **limits):
    return Comparison(before or base(), after or kept(), **{"max_drop": 0.10} | limits)


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


REFUSED = {
    "nothing was evicted": (None, kept(held=Held(1, 1, 1), ratio=1.0, bytes_held=80)),
    "scores 0 on all 50 samples.*1 - score": (
        base(0, higher_is_better=False),
        kept(0, higher_is_better=False),
    ),
    "no sample was run": (base(0, 0), kept(0, 0)),
    "not answer the same samples: s47, s48, s49$": (base(40, 47), kept(40)),
    "same samples: s46, s47, s48 and 1 more$": (base(40, 46), kept(40)),
    "same samples: s03, s04, s05 and 44 more": (base(2), kept(2, 3)),
    "protocol is 'prompt', the compressed run's 'context'": (None, kept(protocol="context")),
    "task is 'retrieval', the compressed run's 'coding'": (None, kept(task="coding")),
    "baseline ran under 'knorm', not with the full cache": (base(policy="knorm"), None),
    "26.00% of the prompts was held where 25.00% was asked": (
        None,
        kept(held=Held(0.2, 0.26, 0.3)),
    ),
    "what the compressed run held was not measured": (None, kept(held=None)),
    "snapkv@0.25 ended with an error: out of memory": (None, kept(error="out of memory")),
    "full@1 ended with an error: out of memory": (base(error="out of memory"), None),
}


@pytest.mark.parametrize(("reason", "runs"), REFUSED.items(), ids=list(REFUSED))
@pytest.mark.parametrize("mode", ["gate", "proved", "regression"])
def test_runs_that_prove_nothing_are_refused_and_never_hold(reason, runs, mode):
    c = compare(*runs, mode=mode)
    assert c.verdict == "refused"
    assert not c.holds
    assert c.weakness is None
    with pytest.raises(Refused, match=reason):
        assert c.dp >= -1
    with pytest.raises(Refused, match=reason):
        assert c.interval
    assert f": refused: {c.reason}>" in repr(c)


def test_evicting_only_while_decoding_is_not_nothing():
    assert compare(after=kept(held=Held(1, 1, 1), ratio=1.0, bytes_held=80, evicted=True)).holds


def test_storing_the_same_positions_smaller_is_not_nothing():
    assert compare(after=kept(held=Held(1, 1, 1), ratio=1.0, bytes_held=40)).holds


@pytest.mark.parametrize("saves", ["positions", "bytes", "reads"])
@pytest.mark.parametrize(("share", "allowed"), [(0.25, True), (0.2501, False)])
def test_a_budget_is_a_budget_to_the_last_token(saves, share, allowed):
    whole = base(bytes_full=10_000, bytes_held=10_000)
    sizes = {"bytes_full": 10_000, "bytes_held": round(10_000 * share)}
    run = kept(saves=saves, held=Held(0.2, share, 0.3), read=share, **sizes)
    refusal = compare(whole, run).refusal
    assert refusal is None if allowed else "25.01%" in refusal
    if saves == "bytes" and not allowed:
        assert "ask for a ratio of 0.251 or" in refusal  # which would do


def test_a_held_fraction_of_the_ratio_itself_is_not_too_much():
    third = math.nextafter(1 / 3, 1)
    assert compare(after=kept(held=Held(0.3, third, 0.4), ratio=1 / 3)).holds


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


def stored(share, ratio=0.25):
    whole = base(bytes_full=1000, bytes_held=1000)
    sizes = {"bytes_full": 1000, "bytes_held": round(share * 1000)}
    return compare(whole, kept(saves="bytes", ratio=ratio, held=Held(1, 1, 1), **sizes))


def test_a_storage_is_judged_by_its_bytes():
    assert stored(0.25).refusal is None
    assert "25% of the bytes held" in repr(stored(0.25))
    assert stored(0.99, ratio=1.0).refusal is None
    assert "takes 1000 bytes, 1000 in full" in stored(1.0, ratio=1.0).refusal
    over = stored(0.312).refusal
    assert "31.20% of the full cache's bytes were held where 25.00% was asked for" in over
    assert "a ratio of 0.312" in over


def test_a_storage_that_stored_nothing_says_so():
    run = kept(saves="bytes", bytes_full=0, bytes_held=0, held=None, error="s0: no groups")
    assert run.remains == "not measured"
    assert "ended with an error: s0: no groups" in compare(after=run).refusal


def test_reading_less_is_judged_by_what_was_read():
    def read(share, ratio=0.25):
        return compare(after=kept(saves="reads", read=share, ratio=ratio, held=Held(1, 1, 1)))

    assert read(0.24).refusal is None
    assert "24% read: pass" in repr(read(0.24))
    assert "was not measured" in read(None).refusal
    assert "everything that was held was read" in read(1.0, ratio=1.0).refusal
    assert "26.00% of what was held was read where 25.00% was asked for" in read(0.26).refusal
