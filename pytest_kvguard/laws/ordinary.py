"""Prompts as people have them: longer than any window, made of shots, in models of many layers."""

from itertools import cycle

import torch

from pytest_kvguard.policies.base import DecodeState, LayerState, Passage, Unit
from pytest_kvguard.states import DEEP, decode_state, layer_state

LONGEST = 320
"""Longer than any window, run or page that our policies have by default, two runs of LagKV too."""

MARGIN = 20
"""One part in so many at either end of a prompt belongs to no shot."""

SHOT_SIZES = (9, 14, 1, 23, 6)

ORDINARY_RATIOS = (0.5, 0.25, 0.9)


def ordinary_prompts(*, narrowed: bool = False) -> tuple[LayerState, ...]:
    """Return prompts of several models; the second is as long as the first, and of its model.

    ``narrowed``: earlier layers have dropped a part of each.
    """
    left = 0.7 if narrowed else None
    return (
        _prompt(LONGEST, seed=1, layer=1, layers=4, alive=left),
        _prompt(LONGEST, seed=2, layer=1, layers=4, alive=left),
        _prompt(
            200, seed=3, heads=3, group=1, layer=DEEP - 1, layers=DEEP, alive=left,
            dtype=torch.bfloat16, texture="outliers", heads_last=True,
        ),
        _prompt(97, seed=4, heads=1, group=7, size=16, dtype=torch.float16, alive=left),
        _prompt(40, seed=5, heads=4, layers=2, texture="level", alive=left),
    )  # fmt: skip


def ordinary_steps(*, sums: bool) -> tuple[DecodeState, ...]:
    """Return steps of answers that have come far, three rows at a time."""
    mixed, low = (0.5, 0.25, 0.9), (0.25, 0.1, 0.5)
    return (
        decode_state(seed=1, ratios=mixed, slots=40, tokens=60, sums=sums),
        decode_state(seed=2, ratios=low, slots=40, tokens=60, alike=True, sums=sums),
        decode_state(
            seed=3, ratios=low, heads=4, slots=99, tokens=200, protected=1, paid=3, sums=sums,
        ),
        decode_state(
            seed=4, ratios=mixed, heads=1, group=7, slots=20, tokens=30, texture="outliers",
            protected=None, sums=sums,
        ),
    )  # fmt: skip


def _prompt(length: int, **model: object) -> LayerState:
    margin = max(1, length // MARGIN)
    parts = [("system", 0, margin), ("shot", margin, length - margin)]
    parts.append(("question", length - margin, length))
    return layer_state(
        length,
        protected=(0, length - 1),
        units=_shots(margin, length - margin),
        passages=tuple(Passage(kind, range(*ends)) for kind, *ends in parts),
        special=(0, margin),
        **model,  # type: ignore[arg-type]
    )


def _shots(start: int, stop: int) -> tuple[Unit, ...]:
    units: list[Unit] = []
    for size in cycle(SHOT_SIZES):
        units.append((range(start, min(stop, start + size)),))
        start += size
        if start >= stop:
            return tuple(units)
    raise AssertionError("sizes are above 0")
