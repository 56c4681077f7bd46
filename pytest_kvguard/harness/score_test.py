"""The score test of a ratio of paired proportions, kept / base = theta, and its inversion.

Nam and Blackwelder, 2002, https://doi.org/10.1002/sim.1036
Tang, Tang and Chan, 2003, https://doi.org/10.1002/sim.1403
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NOTHING = 1e-9
"""Samples right, of which fewer are none: only fractions of marks are so small."""


class Table(NamedTuple):
    """Samples right in both runs, at baseline only, compressed only.

    Those wrong in both say nothing about a ratio and are in no formula below.
    """

    both: float
    broke: float
    mended: float

    @classmethod
    def of(cls, base: NDArray[np.float64], kept: NDArray[np.float64]) -> "Table":
        """Count (S,) scores; a fraction counts as that fraction of a sample."""
        return cls(
            both=math.fsum(np.minimum(base, kept)),
            broke=math.fsum(np.maximum(base - kept, 0)),
            mended=math.fsum(np.maximum(kept - base, 0)),
        )

    @property
    def right(self) -> float:
        """Right at baseline."""
        return self.both + self.broke

    @property
    def still(self) -> float:
        """Right when compressed."""
        return self.both + self.mended

    @property
    def some(self) -> float:
        """Right in at least one run."""
        return self.both + self.broke + self.mended


def null_variance(table: Table, theta: float) -> float:
    """Return the variance of still - theta * right, if theta really is their ratio; theta > 0.

    It is theta * some * (p10 + p01) at the likeliest p10 and p01 that allow theta: those at which
    both log p11 + broke log p10 + mended log p01 is largest under p11 + p10 + p01 = 1 and
    p11 + p01 = theta (p11 + p10). There, p01 is the larger root of a quadratic.
    """
    if theta > 1:  # the same with the runs swapped, where nothing cancels
        swapped = Table(table.both, broke=table.mended, mended=table.broke)
        return theta**2 * null_variance(swapped, 1 / theta)
    a = theta * (1 + theta) * table.some
    b = table.still - (table.some + table.mended) * theta**2
    c = -table.mended * theta * (1 - theta)
    p01 = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    return theta * table.some * ((1 - theta) + (1 + theta) * p01)


def ratio_limits(table: Table, z: float) -> tuple[float, float]:
    """Return the lowest and highest theta whose score statistic is within -z and z.

    Needs neither discordant pairs nor a least number of samples; (0, inf) where nothing is right.
    """
    if table.right < NOTHING:
        return 0.0, math.inf
    if table.still < NOTHING:
        return 0.0, z * z / table.right
    observed = table.still / table.right

    def statistic(theta: float) -> float:
        error = math.sqrt(null_variance(table, theta))
        return (table.still - theta * table.right) / error if error else 0.0

    # With every pair discordant the test is widest: a quadratic that brackets both limits.
    half = observed + z * z * table.some / (2 * table.right**2)
    highest = half + math.sqrt(half * half - observed**2)
    lowest = observed**2 / highest
    low = _root(lambda theta: statistic(theta) - z, lowest / 2, observed)
    high = _root(lambda theta: statistic(theta) + z, observed, 2 * highest)
    return low, high


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Return where f changes sign, 0 < low < high; sought in logarithms, as befits a ratio."""
    from scipy.optimize import brentq

    return math.exp(brentq(lambda log: f(math.exp(log)), math.log(low), math.log(high)))
