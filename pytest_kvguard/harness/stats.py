"""Did it get worse, by how much, and do we know? Paired statistics, pure functions over arrays.

``base`` and ``kept`` are (S,) scores in [0, 1] of the same samples in the same order: with the
full cache, and with what a policy kept of it. theta = mean(kept) / mean(base) = 1 + dP.

Levels are two-sided: an interval at level 0.90 leaves 5 % on either side, so that a limit below
it (or above it) is a one-sided test at alpha = 0.05.

``clusters`` are S labels; samples of the same label share a context and are not independent. None,
or no label twice: all are.
"""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.harness.clustered import Clusters, Unseen, widest_limits
from pytest_kvguard.harness.score_test import NOTHING, Table, null_variance, ratio_limits

Scores: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]
Labels: TypeAlias = Sequence[Hashable]

ALPHA = 0.05
"""One-sided error rate of every yes or no that is not given a level."""

FEWEST_DIFFERENT = 10
"""Below this many samples whose score changed, a t test is not trusted."""

ROUNDS = 50
"""Of how many samples are needed, which depends on how many clusters those are in."""

FEWEST_ABOVE_CHANCE = 5.0
"""A relative change of a score sum smaller than this, in samples, says nothing."""


def relative_change(base: ArrayLike, kept: ArrayLike) -> float:
    """Return dP = (mean(kept) - mean(base)) / mean(base); -0.25 is a quarter lost.

    Raises InvalidArgument where the baseline scores nothing.
    """
    before, after = _paired(base, kept)
    # Sums, not means: exact for 0/1 scores, so that a drop of exactly the limit is not past it.
    return (math.fsum(after) - math.fsum(before)) / math.fsum(before)


def interval(
    base: ArrayLike,
    kept: ArrayLike,
    *,
    level: float = 0.90,
    clusters: Labels | None = None,
    higher_is_better: bool = True,
) -> Interval:
    """Return the interval of dP: by the score test, or for fractional scores by Fieller.

    Fractional scores of which fewer than FEWEST_DIFFERENT changed go by the score test as well:
    the variance that a t test needs is hardly to be seen in them.

    With clusters, whichever test it is has its variance multiplied by the design effect, and its
    quantile is that of t for the number of clusters: see `Clusters`. The end towards which scores
    get worse counts a cluster that was not seen and got worse as a whole: where contexts seldom
    break, but then break whole, samples without such a one are no proof. Fractional scores
    that changed in fewer than FEWEST_DIFFERENT clusters, counted by how much, have that end no
    nearer than the score test puts it. Never narrower than without clusters; (-1, inf) for a
    single one.
    """
    before, after = _paired(base, kept)
    shared = _shared(before, after, clusters)
    if shared is not None:
        return _clustered_interval(before, after, shared, level, higher_is_better)
    invert = score_interval if _by_score_test(before, after) else fieller_interval
    return invert(before, after, level=level)


def score_interval(base: ArrayLike, kept: ArrayLike, *, level: float = 0.90) -> Interval:
    """Return the interval of dP that inverts the score test of a ratio of paired proportions.

    Nam and Blackwelder, 2002, https://doi.org/10.1002/sim.1036; Tang, Tang and Chan, 2003,
    https://doi.org/10.1002/sim.1403. It contains dP, starts at -1 or above, and needs neither
    discordant pairs nor a least number of samples.

    Written for 0/1 scores; a fraction counts as that fraction of a sample. This treats it as a
    coin of that bias, which varies more than the fraction does: the interval errs on the wide side.
    """
    z = _z(1 - _tail(level))
    low, high = ratio_limits(Table.of(*_paired(base, kept)), z)
    return low - 1, high - 1


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


def _clustered_interval(
    before: Scores, after: Scores, clusters: Clusters, level: float, higher_is_better: bool
) -> Interval:
    """Invert the test that `interval` would, with the variance and the quantile of clusters."""
    table = Table.of(before, after)
    if table.right < NOTHING:
        return -1.0, math.inf
    if table.still < NOTHING:
        table, after = Table(0.0, table.right, 0.0), np.zeros_like(before)
    (var_kept, cov), (_, var_base) = np.cov(after, before) * len(before)  # of the sums
    by_score_test = _by_score_test(before, after)

    def statistic(theta: float, unseen: Unseen | None) -> float:
        seen = max(var_kept - 2 * theta * cov + theta**2 * var_base, 0.0)
        if by_score_test:
            variance = null_variance(table, theta)
        elif unseen and clusters.changed < FEWEST_DIFFERENT:
            variance = max(null_variance(table, theta), seen)
        else:
            variance = seen
        error = math.sqrt(variance * clusters.design_effect(theta, unseen=unseen))
        return (table.still - theta * table.right) / error if error else 0.0

    low, high = widest_limits(
        below=lambda theta: statistic(theta, "lost" if higher_is_better else None),
        above=lambda theta: statistic(theta, None if higher_is_better else "gained"),
        quantile=clusters.quantile(1 - _tail(level)),
        observed=table.still / table.right,
    )
    return low - 1, high - 1


def samples_needed(
    base: ArrayLike,
    kept: ArrayLike,
    limit: float,
    *,
    power: float = 0.8,
    clusters: Labels | None = None,
    higher_is_better: bool = True,
) -> int | None:
    """Return about how many samples would tell dP from ``limit``, if dP is what was observed.

    Normal approximation for kept - (1 + limit) * base, one-sided at ALPHA: its variance at the
    limit sets the bar, the observed one the chance to clear it. With clusters, as many samples in
    each as there are. None where dP is at the limit, and for a single cluster.
    """
    before, after = _paired(base, kept)
    if limit <= -1:
        raise InvalidArgument(f"limit must be above -1, a total loss, got {limit!r}")
    distance = after - (1 + limit) * before
    gap = float(distance.mean())
    if math.isclose(gap, 0, abs_tol=1e-12):
        return None
    spread = bar = math.sqrt(_variance(distance))
    if _by_score_test(before, after):
        bar = math.sqrt(null_variance(Table.of(before, after), 1 + limit) / len(before))
    shared = _shared(before, after, clusters)
    if shared is None:
        return math.ceil(((_z(1 - ALPHA) * bar + _z(power) * spread) / gap) ** 2)
    if shared.number == 1:
        return None
    observed = math.fsum(after) / math.fsum(before)
    unseen: Unseen | None = None
    if (gap > 0) is higher_is_better:  # to be proved harmless
        unseen = "lost" if higher_is_better else "gained"
    times = 1.0  # as many clusters: it depends on that what t asks for and what one more matters
    for _ in range(ROUNDS):
        more = max(times, 2 / shared.effective)  # with fewer than two, t asks for everything
        bars = bar * math.sqrt(shared.design_effect(1 + limit, unseen=unseen, times=more))
        spreads = spread * math.sqrt(shared.design_effect(observed, times=more))
        error = shared.quantile(1 - ALPHA, times=more) * bars + _z(power) * spreads
        times = (error / gap) ** 2 / len(before)
    return math.ceil(times * len(before))


def smallest_drop_seen(
    base: ArrayLike, kept: ArrayLike, *, power: float = 0.8, clusters: Labels | None = None
) -> float:
    """Return the smallest true drop, as a positive |dP|, that this many samples tend to show.

    Normal approximation on the paired variance of kept - base, one-sided at ALPHA; never smaller
    than what `interval` allows if not one sample changed. 1, a total loss, for a single cluster.
    """
    before, after = _paired(base, kept)
    unchanged = -interval(before, before, level=1 - 2 * ALPHA, clusters=clusters)[0]
    shared = _shared(before, after, clusters)
    if shared is not None and shared.number == 1:
        return 1.0
    quantile = _z(1 - ALPHA) if shared is None else shared.quantile(1 - ALPHA)
    variance = _variance(after - before) * len(before)  # of the sum
    if shared is not None:
        variance *= shared.design_effect(1.0)
    return max((quantile + _z(power)) * math.sqrt(variance) / math.fsum(before), unchanged)


def mcnemar(broke: int, mended: int) -> float:
    """Exact two-sided p-value of the hypothesis that answers break and mend equally often."""
    if broke < 0 or mended < 0:
        raise InvalidArgument(f"broke and mended must be >= 0, got {broke!r} and {mended!r}")
    if broke + mended == 0:
        return 1.0
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(broke, mended), broke + mended, 0.5)))


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
    from scipy.special import bdtrc, stdtr

    n = len(marks)
    if _binary(marks):
        return float(bdtrc(marks.sum() - 1, n, chance))
    error = max(math.sqrt(_variance(marks) / n), 1e-12)  # all alike: no doubt left
    return float(stdtr(n - 1, (chance - marks.mean()) / error))


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


def _shared(before: Scores, after: Scores, labels: Labels | None) -> Clusters | None:
    """Return the clusters of paired scores, or None where every sample is one of its own."""
    if labels is None:
        return None
    if len(labels) != len(before):
        raise InvalidArgument(
            f"each sample has one cluster, got {len(before)} samples and {len(labels)} clusters"
        )
    return None if len(set(labels)) == len(labels) else Clusters.of(before, after, labels)


def _scores(values: ArrayLike, name: str) -> Scores:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise InvalidArgument(f"{name} must be a list of at least one score, got {array.shape}")
    if not ((array >= 0) & (array <= 1)).all():  # nan fails too
        odd = array[~((array >= 0) & (array <= 1))][0]
        raise InvalidArgument(f"{name} must hold scores in [0, 1], got {odd}")
    return array


def _by_score_test(before: Scores, after: Scores) -> bool:
    changed = int(np.count_nonzero(before != after))
    return (_binary(before) and _binary(after)) or changed < FEWEST_DIFFERENT


def _binary(marks: Scores) -> bool:
    return bool(((marks == 0) | (marks == 1)).all())


def _variance(values: Scores) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise InvalidArgument(f"level must be in (0, 1), got {level!r}")
    return (1 - level) / 2


def _z(probability: float) -> float:
    return NormalDist().inv_cdf(probability)
