"""Runs that score what a test says, and their comparison."""

import dataclasses

from pytest_kvguard.harness.compare import Comparison
from pytest_kvguard.harness.records import FULL, Held, Run

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


def five_each(n=50):
    """Clusters of five samples."""
    return {f"s{i:02}": f"s{i - i % 5:02}" for i in range(n)}


def compare(before=None, after=None, **limits):
    return Comparison(before or base(), after or kept(), **{"max_drop": 0.10} | limits)
