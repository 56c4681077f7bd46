"""How many positions a layer keeps. The only place that rounds."""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from numbers import Real
from operator import mul

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument, Refused
from pytest_kvguard.parameters import check_count, check_share
from pytest_kvguard.policies.base import Budget, LayerState
from pytest_kvguard.policies.units import check_units, must_stay

SLACK = 1e-9
"""0.29 * 100 is 28.999999999999996; what is this close to a whole number is one."""


BISECTIONS = 48  # until float64 can hardly tell the ends apart


def check_ratio(value: float) -> float:
    """Return a keep ratio, the fraction *kept*; raise InvalidArgument outside (0, 1]."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value <= 1:
        raise InvalidArgument(f"keep ratio must be in (0, 1], got {value!r}")
    return float(value)


def share(count: int, ratio: float) -> int:
    """Return the whole part of ``ratio`` of ``count``."""
    return math.floor(count * ratio + SLACK)


def shares(counts: Tensor, ratios: Tensor | float) -> Tensor:
    """Return `share` of every element, int64."""
    return torch.floor(counts.double() * ratios + SLACK).long()


def keep_ratio(state: LayerState, ratio: float) -> int:
    """Keep this fraction of the positions, rounded down, but never fewer than one.

    Raises Refused when that cannot hold the protected positions.
    """
    return _holding(int(state.protected.sum()), "protected", state, ratio)


def keep_ratio_of_units(state: LayerState, ratio: float) -> int:
    """Like `keep_ratio`, where positions outside all units count as protected too.

    Raises InvalidArgument for a prompt without units.
    """
    check_units(state)
    return _holding(int(must_stay(state).sum()), "protected or in no unit", state, ratio)


def fair_shares(n: int, sizes: Sequence[int], least: Sequence[int]) -> list[int]:
    """Split n positions over parts in proportion to their sizes, none getting less than its least.

    A part whose least is more than its proportion gets that, and the others split the rest. The
    shares add up to n, each less than one from its proportion: rounded down, then one more for
    the largest remainders, of equals the earlier (Hamilton's method). sum(least) <= n <=
    sum(sizes).
    """
    short: set[int] = set()  # parts that get their least
    while True:
        open_ = [part for part in range(len(sizes)) if part not in short]
        rest = n - sum(least[part] for part in short)
        exact = {p: Fraction(rest * sizes[p], sum(sizes[q] for q in open_)) for p in open_}
        more = {part for part in open_ if exact[part] < least[part]}
        if not more:
            break
        short |= more
    shares = [math.floor(exact.get(part, least[part])) for part in range(len(sizes))]
    by_remainder = sorted(exact, key=lambda part: shares[part] - exact[part])
    for part in by_remainder[: n - sum(shares)]:
        shares[part] += 1
    return shares


def whole_pages(length: int, ratio: float, page: int) -> int:
    """Return how many pages of ``page`` positions fit the share of a prompt that may be read."""
    return share(length, ratio) // page


def everything_in_pages(page: int) -> Budget:
    """Return a budget that holds everything, of which the ratio's share is read in whole pages.

    Raises Refused when not even one page may be read. At ratio 1 everything is read.
    """
    check_count("page", page)

    def budget(state: LayerState, ratio: float) -> int:
        if check_ratio(ratio) < 1 and not whole_pages(state.length, ratio, page):
            room = share(state.length, ratio)
            raise Refused(
                f"keep ratio {ratio:g} of {state.length} positions is {room}, less than one page "
                f"of {page}; use longer prompts, a larger ratio or smaller pages"
            )
        return state.length

    return budget


def pyramid(beta: int = 20, window: int = 32) -> Budget:
    """Return a budget that falls from the first layer to the last (PyramidKV, section 3.3).

    On top of what every layer holds alike, the protected positions and the window, the last
    layer gets ``1 / beta`` of the mean and the first layer what is then left; a first layer that
    would get more than the prompt has gets the prompt, and the last layer the difference. Where
    the mean cannot hold the window, only the protected positions are held alike, so that the
    budgets still form a pyramid. Each is rounded down: over all layers they never exceed
    ``layers`` times `keep_ratio`, and stay below it by less than one position a layer.

    Raises Refused as `keep_ratio` does.
    """
    check_count("beta", beta)
    check_count("window", window)

    def budget(state: LayerState, ratio: float) -> int:
        mean = keep_ratio(state, ratio)
        if state.layers == 1:
            return mean
        alike = _held_alike(state, window, mean)
        room = mean - alike
        first = min(2 * room - room // beta, state.length - alike)
        last = 2 * room - first
        steps = state.layers - 1
        return alike + (first * (steps - state.layer) + last * state.layer) // steps

    return budget


def narrowing(recent: float = 0.2) -> Budget:
    """Return a budget that each layer cuts from what the layer before left (PyramidInfer).

    Layer i keeps ``start * ((1 - end) * (cos(pi * i / layers) + 1) / 2 + end)`` of that. As in
    the published code ``start`` is 1 and ``end`` is in [0, 1]; where even an ``end`` of 0 keeps
    too much, ``start`` falls below 1 too. Every layer holds the protected positions or a
    ``recent`` share of the prompt, whichever are more, the latter up to half of the mean; the
    cuts are made of the rest. The least cuts are taken whose mean over the layers, in whole
    positions, is within `keep_ratio`.

    Raises Refused as `keep_ratio` does.
    """
    check_share("recent", recent)

    def budget(state: LayerState, ratio: float) -> int:
        mean = keep_ratio(state, ratio)
        alike = max(1, int(state.protected.sum()), min(share(state.length, recent), mean // 2))
        return _narrowed(state.length, alike, mean, state.layers)[state.layer]

    return budget


@lru_cache(maxsize=4096)  # every layer of a prompt asks for the same
def _narrowed(length: int, alike: int, mean: int, layers: int) -> tuple[int, ...]:
    """Return the positions each layer keeps, `mean` on average or as little fewer as can be."""

    def budgets(gentle: float) -> tuple[int, ...]:
        start, end = min(1.0, 2 * gentle), max(0.0, 2 * gentle - 1)
        cosines = ((math.cos(math.pi * i / layers) + 1) / 2 for i in range(layers))
        left = accumulate((start * ((1 - end) * c + end) for c in cosines), mul)
        return tuple(alike + share(length - alike, part) for part in left)

    low, high = 0.0, 1.0
    if sum(budgets(high)) <= mean * layers:
        return budgets(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(budgets(middle)) <= mean * layers else (low, middle)
    return budgets(low)


def _held_alike(state: LayerState, window: int, mean: int) -> int:
    held = state.protected.clone()
    held[-window:] = True
    if int(held.sum()) < mean:
        return int(held.sum())
    return max(1, int(state.protected.sum()))


def _holding(fixed: int, what: str, state: LayerState, ratio: float) -> int:
    budget = max(1, share(state.length, check_ratio(ratio)))
    if budget < fixed:
        enough = math.ceil(1000 * fixed / state.length - SLACK) / 1000
        raise Refused(
            f"keep ratio {ratio:g} of {state.length} positions is {budget}, but {fixed} are "
            f"{what}; the smallest ratio that holds them is {enough:g}"
        )
    return budget
