"""Paired scores in clusters, drawn: of known loss, discordance and intra-class correlation."""

import math

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def draw(
    rng: np.random.Generator,
    clusters: int,
    size: int,
    *,
    icc: float,
    base: float,
    loss: float,
    mended: float = 0.0,
    graded: bool = False,
) -> tuple[Scores, Scores, NDArray[np.int64]]:
    """Draw the scores of both runs, and the cluster of each sample.

    Each sample is a copy of its cluster's own draw with probability sqrt(icc), so that any two of
    a cluster correlate by icc, whatever is scored: Lunn and Davies, 1998,
    https://doi.org/10.1093/biomet/85.2.487.

    base, loss: the true mean of the baseline and -dP; mended: share of the wrong that become
    right, where scores are 0 or 1. Graded scores lose their share of `loss` in half the samples.
    """
    of_sample = np.repeat(np.arange(clusters), size)
    own, shared = (
        _pairs(rng, count, base, loss, mended, graded) for count in (len(of_sample), clusters)
    )
    copied = rng.random(len(of_sample)) < math.sqrt(icc)
    before, after = (np.where(copied, s[of_sample], o) for o, s in zip(own, shared, strict=True))
    return before, after, of_sample


def _pairs(
    rng: np.random.Generator, n: int, base: float, loss: float, mended: float, graded: bool
) -> tuple[Scores, Scores]:
    if graded:
        before = rng.beta(4 * base, 4 * (1 - base), n)
        left = rng.beta(12 * (0.5 - loss), 12 * loss, n) if loss else np.ones(n)
        return before, before * np.where(rng.random(n) < 0.5, left, 1.0)
    broken = loss + (1 - base) * mended / base
    if not 0 <= broken <= 1:
        raise ValueError(f"{mended} mended leaves no way to lose {loss} of {base}")
    right, luck = rng.random(n) < base, rng.random(n)
    after = np.where(right, luck >= broken, luck < mended)
    return right.astype(np.float64), after.astype(np.float64)
