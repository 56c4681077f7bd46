"""Did it get worse, by how much, and do we know? Paired statistics, pure functions over arrays.

``base`` and ``kept`` are (S,) scores in [0, 1] of the same samples in the same order: with the
full cache, and with what a policy kept of it. theta = mean(kept) / mean(base) = 1 + dP.

Levels are two-sided: an interval at level 0.90 leaves 5 % on either side, so that a limit below
it (or above it) is a one-sided test at alpha = 0.05.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pytest_kvguard.errors import InvalidArgument

Scores: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]

ALPHA = 0.05
"""One-sided error rate of every yes or no that is not given a level."""

FEWEST_DIFFERENT = 10
"""Below this many samples whose score changed, a t test is not trusted."""

FEWEST_ABOVE_CHANCE = 5.0
"""A relative change of a score sum smaller than this, in samples, says nothing."""


def relative_change(base: ArrayLike, kept: ArrayLike) -> float:
    """Return dP = (mean(kept) - mean(base)) / mean(base); -0.25 is a quarter lost.

    Raises InvalidArgument where the baseline scores nothing.
    """
    before, after = _paired(base, kept)
    # Sums, not means: exact for 0/1 scores, so that a drop of exactly the limit is not past it.
    return (math.fsum(after) - math.fsum(before)) / math.fsum(before)


def interval(base: ArrayLike, kept: ArrayLike, *, level: float = 0.90) -> Interval:
    """Return the interval of dP: by the score test, or for fractional scores by Fieller.

    Fractional scores of which fewer than FEWEST_DIFFERENT changed go by the score test as well:
    the variance that a t test needs is hardly to be seen in them.
    """
    before, after = _paired(base, kept)
    marks = np.concatenate([before, after])
    binary = bool(((marks == 0) | (marks == 1)).all())
    if binary or np.count_nonzero(before != after) < FEWEST_DIFFERENT:
        return score_interval(before, after, level=level)
    return fieller_interval(before, after, level=level)


def score_interval(base: ArrayLike, kept: ArrayLike, *, level: float = 0.90) -> Interval:
    """Return the interval of dP that inverts the score test of a ratio of paired proportions.

    Nam and Blackwelder, 2002, https://doi.org/10.1002/sim.1036; Tang, Tang and Chan, 2003,
    https://doi.org/10.1002/sim.1403. Contains dP, stays within [-1, inf), needs no discordant
    pair, no minimum of samples.

    Written for 0/1 scores; a fraction counts as that fraction of a sample. This treats it as a
    coin of that bias, which varies more than the fraction does: the interval errs on the wide side.
    """
    before, after = _paired(base, kept)
    z = _z(1 - _tail(level))
    both = math.fsum(np.minimum(before, after))
    broke = math.fsum(np.maximum(before - after, 0))
    mended = math.fsum(np.maximum(after - before, 0))
    right, still = both + broke, both + mended  # at baseline, when compressed
    some = both + broke + mended

    def statistic(theta: float) -> float:
        spread = theta * some * _discordance(theta, both, broke, mended)
        distance = still - theta * right
        return distance / math.sqrt(spread) if spread > 0 else 0.0

    # With every pair discordant the test is widest: a quadratic that brackets both limits.
    half = still / right + z * z * some / (2 * right * right)
    highest = half + math.sqrt(max(half * half - (still / right) ** 2, 0.0))
    low, high = 0.0, _root(lambda theta: statistic(theta) + z, still / right, 2 * highest)
    if still > 0:
        lowest = (still / right) ** 2 / highest
        low = _root(lambda theta: statistic(theta) - z, lowest / 2, still / right)
    return low - 1, high - 1


def _discordance(theta: float, both: float, broke: float, mended: float) -> float:
    """Return the likeliest share of discordant pairs, [0, 1], if kept / base really is theta.

    Of the samples right in at least one run: those wrong in both say nothing about a ratio.
    The likelihood both log p11 + broke log p10 + mended log p01 under p11 + p10 + p01 = 1 and
    p11 + p01 = theta (p11 + p10) has its maximum at the larger root of a quadratic in p01.
    """
    a = theta * (1 + theta) * (both + broke + mended)
    b = (both + mended) - (both + broke + 2 * mended) * theta**2
    c = -mended * theta * (1 - theta)
    p01 = (-b + math.sqrt(max(b * b - 4 * a * c, 0.0))) / (2 * a)
    return (1 - theta) + (1 + theta) * p01


def fieller_interval(base: ArrayLike, kept: ArrayLike, *, level: float = 0.90) -> Interval:
    """Return the interval of dP that inverts the paired t test of kept - theta * base.

    Fieller, 1954, https://doi.org/10.1111/j.2517-6161.1954.tb00159.x. Cut off at -1. It is
    (-1, inf) where the baseline itself cannot be told from 0 or there is one sample only, and a
    single point where all samples changed by the same factor: see ``interval``.
    """
    before, after = _paired(base, kept)
    n = len(before)
    if n < 2:
        return -1.0, math.inf
    from scipy.special import stdtrit

    t2 = float(stdtrit(n - 1, 1 - _tail(level))) ** 2
    (var_kept, cov), (_, var_base) = np.cov(after, before) / n  # of the means
    mean_base, mean_kept = float(before.mean()), float(after.mean())
    a = mean_base**2 - t2 * var_base
    if a <= 0:
        return -1.0, math.inf
    b = mean_base * mean_kept - t2 * cov
    c = mean_kept**2 - t2 * var_kept
    root = math.sqrt(max(b * b - a * c, 0.0))
    return max((b - root) / a - 1, -1.0), float((b + root) / a - 1)


def samples_needed(
    base: ArrayLike, kept: ArrayLike, limit: float, *, power: float = 0.8
) -> int | None:
    """Return about how many samples would tell dP from ``limit``, if dP is what was observed.

    Normal approximation on the paired variance of kept - (1 + limit) * base, one-sided at ALPHA,
    and never fewer than identical runs would need. None where dP is at the limit itself.
    """
    before, after = _paired(base, kept)
    distance = after - (1 + limit) * before
    gap = float(distance.mean())
    if math.isclose(gap, 0, abs_tol=1e-12):
        return None
    z = _z(1 - ALPHA)
    needed = (z + _z(power)) ** 2 * _variance(distance) / gap**2
    if limit != 0:
        worst = 1 + min(limit, 0.0)
        needed = max(needed, z * z * worst / abs(limit) / float(before.mean()))
    return math.ceil(needed)


def smallest_drop_seen(base: ArrayLike, kept: ArrayLike, *, power: float = 0.8) -> float:
    """Return the smallest true drop, as a positive |dP|, that this many samples tend to show.

    Normal approximation on the paired variance of kept - base, one-sided at ALPHA; never smaller
    than what the score test allows if not one sample changed.
    """
    before, after = _paired(base, kept)
    z, right = _z(1 - ALPHA), math.fsum(before)
    spread = math.sqrt(_variance(after - before) * len(before))  # of the sum
    return max((z + _z(power)) * spread / right, z * z / (right + z * z))


def mcnemar(broke: int, mended: int) -> float:
    """Exact two-sided p-value of the hypothesis that answers break and mend equally often."""
    if broke < 0 or mended < 0:
        raise InvalidArgument(f"broke and mended must be >= 0, got {broke!r} and {mended!r}")
    if broke + mended == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(broke, broke + mended, 0.5).pvalue)


def too_weak(base: ArrayLike, chance: float) -> str | None:
    """Return why this baseline leaves too little to lose, or None.

    It must score FEWEST_ABOVE_CHANCE samples more than guessing, and significantly more: an
    exact binomial test for 0/1 scores, a t test for fractional ones, one-sided at ALPHA.
    """
    marks = _scores(base, "base")
    if not 0 <= chance < 1:
        raise InvalidArgument(f"chance must be in [0, 1), got {chance!r}")
    n, mean = len(marks), float(marks.mean())
    seen = f"the baseline scores {mean:.3f} on {n} samples where guessing scores {chance:.3f}"
    above = math.fsum(marks) - n * chance
    if above < FEWEST_ABOVE_CHANCE:
        return (
            f"{seen}: {above:.1f} samples above chance, fewer than {FEWEST_ABOVE_CHANCE:g}; "
            f"use more samples, an easier task or a stronger model"
        )
    if (p := _p_above(marks, chance)) >= ALPHA:
        return f"{seen}: that may be luck (p = {p:.2f}); use more samples or an easier task"
    return None


def _p_above(marks: Scores, chance: float) -> float:
    """One-sided p-value of the hypothesis that the mean is no more than chance."""
    from scipy.stats import binomtest, ttest_1samp

    if bool(((marks == 0) | (marks == 1)).all()):
        return float(binomtest(int(marks.sum()), len(marks), chance, alternative="greater").pvalue)
    if _variance(marks) == 0:
        return 0.0 if marks[0] > chance else 1.0
    return float(ttest_1samp(marks, chance, alternative="greater").pvalue)


def _paired(base: ArrayLike, kept: ArrayLike) -> tuple[Scores, Scores]:
    before, after = _scores(base, "base"), _scores(kept, "kept")
    if len(before) != len(after):
        raise InvalidArgument(
            f"scores are paired by sample, got {len(before)} of the baseline and {len(after)} kept"
        )
    if not before.any():
        raise InvalidArgument(
            f"the baseline scores 0 on all {len(before)} samples: dP is undefined"
        )
    return before, after


def _scores(values: ArrayLike, name: str) -> Scores:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise InvalidArgument(f"{name} must be a list of at least one score, got {array.shape}")
    if not ((array >= 0) & (array <= 1)).all():  # nan fails too
        odd = array[~((array >= 0) & (array <= 1))][0]
        raise InvalidArgument(f"{name} must hold scores in [0, 1], got {odd}")
    return array


def _variance(values: Scores) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise InvalidArgument(f"level must be in (0, 1), got {level!r}")
    return (1 - level) / 2


def _z(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    from scipy.optimize import brentq

    return float(brentq(f, low, high))
