"""Runs that prove nothing are refused, at the edge of what they may still prove."""

import math

import pytest

from pytest_kvguard.errors import Refused
from pytest_kvguard.harness.records import Held
from tests.runs import base, compare, five_each, kept

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
    "did not read sample s05 in the same context$": (
        base(clusters=five_each()),
        kept(clusters=five_each() | {"s05": "s00"}),
    ),
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


def test_a_sample_that_was_not_answered_neither_broke_nor_mended():
    assert compare(after=kept(47, 40)).broke == ()
    assert compare(base(40, 40), kept(40, 50)).mended == ()


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
