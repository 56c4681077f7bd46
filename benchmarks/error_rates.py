"""How often verdicts are wrong: ``python benchmarks/error_rates.py``.

Draws pairs of runs whose true dP is known, nothing, the limit and twice the limit, and judges each
pair as `Comparison` does: once as though all samples were independent, and once knowing which of
them share a context. A verdict at the limit is an error on either side; each should be 5 %.
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pytest_kvguard.harness.compare import Comparison
from pytest_kvguard.harness.records import FULL, Held, Run

Scores = NDArray[np.float64]
LIMIT = 0.10


@dataclass(frozen=True)
class Setting:
    """What runs are drawn from."""

    n: int
    size: int  # samples to a context
    icc: float  # intra-class correlation of all that is scored
    base: float  # true mean of the baseline
    mended: float = 0.0  # share of the wrong that become right, and as many break on top of `loss`
    graded: bool = False  # scores anywhere in [0, 1], of which about half change


def settings() -> Iterator[Setting]:
    """Yield those of the table."""
    sizes = [(100, 1), (100, 5), (200, 5), (160, 20), (400, 20)]
    for graded in (False, True):
        for base, mended in [(0.9, 0.1), (0.6, 0.05)]:
            for n, size in sizes:
                for icc in (0.05, 0.3, 0.6) if size > 1 else (0.0,):
                    yield Setting(n, size, icc, base, 0.0 if graded else mended, graded)


def draw(
    rng: np.random.Generator, setting: Setting, loss: float
) -> tuple[Scores, Scores, NDArray[np.int64]]:
    """Draw the scores of both runs, whose true dP is -loss, and the context of each sample.

    Each sample is a copy of what its context draws with probability sqrt(icc), so that any two of
    a context correlate by icc, whatever is scored: Lunn and Davies, 1998,
    https://doi.org/10.1093/biomet/85.2.487.
    """
    contexts = setting.n // setting.size
    context = np.repeat(np.arange(contexts), setting.size)
    own, shared = (_pairs(rng, count, setting, loss) for count in (len(context), contexts))
    copied = rng.random(len(context)) < math.sqrt(setting.icc)
    base, kept = (np.where(copied, s[context], o) for o, s in zip(own, shared, strict=True))
    return base, kept, context


def _pairs(
    rng: np.random.Generator, n: int, setting: Setting, loss: float
) -> tuple[Scores, Scores]:
    if setting.graded:
        base = rng.beta(4 * setting.base, 4 * (1 - setting.base), n)
        left = rng.beta(12 * (0.5 - loss), 12 * loss, n) if loss else np.ones(n)
        return base, base * np.where(rng.random(n) < 0.5, left, 1.0)
    broken = loss + (1 - setting.base) * setting.mended / setting.base
    if not 0 <= broken <= 1:
        raise ValueError(f"{setting} leaves no way to lose {loss}")
    right, luck = rng.random(n) < setting.base, rng.random(n)
    kept = np.where(right, luck >= broken, luck < setting.mended)
    return right.astype(np.float64), kept.astype(np.float64)


def verdicts(
    setting: Setting, loss: float, *, draws: int, seed: int = 0, clustered: bool = True
) -> Counter[str]:
    """Count the verdicts on so many pairs of runs, and under "stopped" what the gate lets not by.

    clustered: whether the runs know which of their samples share a context.
    """
    rng = np.random.default_rng(seed)
    found: Counter[str] = Counter()
    for _ in range(draws):
        base, kept, context = draw(rng, setting, loss)
        names = [f"s{i}" for i in range(len(base))]
        told = dict(zip(names, map(str, context), strict=True)) if clustered else {}
        before, after = (
            Run(
                *("simulated", policy, {}, ratio, "context"),
                scores=dict(zip(names, scores.tolist(), strict=True)),
                clusters=told,
                held=Held(ratio, ratio, ratio),
                bytes_full=4,
                bytes_held=int(4 * ratio),
            )
            for policy, ratio, scores in ((FULL, 1.0, base), ("none", 0.25, kept))
        )
        comparison = Comparison(before, after, max_drop=LIMIT)
        found[comparison.verdict] += 1
        found["stopped"] += not comparison.holds
    return found


COLUMNS = (
    "scores", "n", "contexts", "ICC", "base",
    "limit: fail", "limit: pass", "none: pass", "none: fail", "none: stopped",
    "twice: fail", "twice: stopped",
)  # fmt: skip


def row(setting: Setting, draws: int, seed: int) -> list[str]:
    """Return a row of the table: rates in percent, of independent samples -> of clusters."""

    def rate(loss: float, verdict: str) -> str:
        counts = [found[loss, way][verdict] for way in (False, True)]
        return " -> ".join(f"{100 * count / draws:.1f}" for count in dict.fromkeys(counts))

    found = {
        (loss, clustered): verdicts(setting, loss, draws=draws, seed=seed, clustered=clustered)
        for loss in (0.0, LIMIT, 2 * LIMIT)
        for clustered in (False, True)
    }
    return [
        "graded" if setting.graded else "0/1",
        str(setting.n),
        str(setting.n // setting.size),
        f"{setting.icc:g}" if setting.size > 1 else "-",
        f"{setting.base:g}",
        rate(LIMIT, "fail"),
        rate(LIMIT, "pass"),
        rate(0.0, "pass"),
        rate(0.0, "fail"),
        rate(0.0, "stopped"),
        rate(2 * LIMIT, "fail"),
        rate(2 * LIMIT, "stopped"),
    ]


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="so many of them only")
    args = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for setting in list(settings())[: args.rows]:
        print(f"| {' | '.join(row(setting, args.draws, args.seed))} |", flush=True)


if __name__ == "__main__":
    main()
