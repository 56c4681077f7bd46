"""Samples that share a context err together: how much more the sum of their scores varies.

The design effect is the variance of a sum over clusters divided by that of as many independent
samples (Rao and Scott, 1992, https://doi.org/10.2307/2532311). It is taken under the hypothesis
that is tested, from the sums of kept - theta * base over each cluster, as Obuchowski, 1998,
https://doi.org/10.1002/(SICI)1097-0258(19980715)17:13%3C1495::AID-SIM863%3E3.0.CO;2-I, and
Durkalski et al., 2003, https://doi.org/10.1002/sim.1438, do for theta = 1. Few clusters show it
badly, so quantiles are those of t: Carter, Schnepel and Steigerwald, 2017,
https://doi.org/10.1162/REST_a_00639.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Unseen: TypeAlias = Literal["lost", "gained"]

STEPS = 100
"""Ratios tried on either side of the observed one, for an interval without a hole in it."""


class SquareSum(NamedTuple):
    """Sum of squares of kept - theta * base, for every theta."""

    kept: float  # sum of kept * kept
    mixed: float
    base: float

    @classmethod
    def of(cls, base: NDArray[np.float64], kept: NDArray[np.float64]) -> "SquareSum":
        """Take the sums of (S,) scores."""
        return cls(float(kept @ kept), float(kept @ base), float(base @ base))

    def __call__(self, theta: float) -> float:
        """Return it at theta, never below 0 by rounding."""
        return max(self.kept - 2 * theta * self.mixed + theta**2 * self.base, 0.0)


@dataclass(frozen=True)
class Clusters:
    """Paired scores, and which of them share a context."""

    number: int
    effective: float  # 1..number; fewer than there are where sizes differ
    changed: float  # clusters whose scores changed, as many as if all of them did by as much
    size: float  # samples in the cluster of an average sample
    base: float  # mean score of the baseline, above 0
    kept: float  # mean score of the other run
    sums: SquareSum  # over clusters, of the sums of their samples
    samples: SquareSum  # over samples

    @classmethod
    def of(
        cls, base: NDArray[np.float64], kept: NDArray[np.float64], labels: Sequence[Hashable]
    ) -> "Clusters":
        """Group (S,) scores by S labels. The baseline must not be all 0."""
        index = {label: at for at, label in enumerate(dict.fromkeys(labels))}
        of_sample = np.array([index[label] for label in labels])
        sizes = np.bincount(of_sample).astype(np.float64)
        change = _sums(of_sample, np.abs(kept - base))
        change /= change.max() or 1.0  # squares of next to nothing are nothing
        return cls(
            number=len(sizes),
            # As though all samples of a cluster were one, the worst case of the source.
            effective=float((sizes**2).sum() ** 2 / (sizes**4).sum()),
            changed=float(change.sum() ** 2 / (change**2).sum()) if change.any() else 0.0,
            size=float((sizes**2).sum() / sizes.sum()),
            base=float(base.mean()),
            kept=float(kept.mean()),
            sums=SquareSum.of(_sums(of_sample, base), _sums(of_sample, kept)),
            samples=SquareSum.of(base, kept),
        )

    def design_effect(
        self, theta: float, *, unseen: Unseen | None = None, times: float = 1.0
    ) -> float:
        """Return the design effect, at least 1, if theta > 0 is the ratio of the means.

        unseen: count one cluster more than there are, of the average size, that scores as one run
        does and nothing in the other. Where little has changed, nothing shows whether a context's
        samples change together, and this assumes that they do; many clusters outweigh it.
        times: of how many times as many clusters.
        """
        share = {None: 0.0, "lost": theta**2 * self.base, "gained": self.kept}[unseen] * self.size
        mean = self.kept if unseen == "gained" else self.base
        together = times * self.sums(theta) + share * self.size * mean
        alone = times * self.samples(theta) + share
        return max(together / alone, 1.0) if alone else 1.0

    def quantile(self, probability: float, *, times: float = 1.0) -> float:
        """Return that of t with the effective number of clusters less one; inf for one cluster.

        probability: in (0.5, 1); times: of how many times as many clusters.
        """
        from scipy.special import stdtrit

        freedom = times * self.effective - 1
        if self.number == 1 or freedom <= 0:
            return math.inf
        return float(stdtrit(freedom, probability))


def _sums(of_sample: NDArray[np.int64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.bincount(of_sample, scores).astype(np.float64)


def widest_limits(
    below: Callable[[float], float],
    above: Callable[[float], float],
    quantile: float,
    observed: float,
) -> tuple[float, float]:
    """Return the lowest and highest theta whose statistic is within -quantile and quantile.

    below, above: the statistic of a theta below and above the observed one, positive below and
    negative above it, not always falling; (0, inf) where it never gets that far.
    """
    if math.isinf(quantile):
        return 0.0, math.inf
    # Of angles, so that 0 and inf are as near as any other ratio; no statistic is taken at 0.
    here = max(math.atan(observed), 1e-12)
    low = _farthest(lambda angle: below(math.tan(angle)) - quantile, here, 0.0)
    high = _farthest(lambda angle: -above(math.tan(angle)) - quantile, here, math.pi / 2)
    return (math.tan(low) if low > 0 else 0.0), (math.tan(high) if high < math.pi / 2 else math.inf)


def _farthest(excess: Callable[[float], float], start: float, end: float) -> float:
    """Return where excess rises above 0 for good on the way to the end; the end if it does not."""
    from scipy.optimize import brentq

    beyond = end
    for angle in [*np.linspace(end, start, STEPS, endpoint=False)[1:].tolist(), start]:
        if excess(angle) <= 0:
            return end if beyond == end else float(brentq(excess, angle, beyond))
        beyond = angle
    return start  # of rounding only: nothing exceeds at the start
