"""States that are the same each time: prompts as people have them, and every corner a few times.

What is drawn at random repeats itself, and misses what is rare. A corner here is a value that a
policy may stumble over: a length, a type, a layer, what is protected. Each is met as often as any
other, in company that a shuffle chose (Latin hypercube sampling).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, pairwise
from typing import Any

from pytest_kvguard.policies.base import DecodeState, LayerState, Passage, Unit
from pytest_kvguard.states import DEEP, DTYPES, TEXTURES, decode_state, layer_state

LONGEST = 320
"""Longer than any window, run or page that our policies have by default, two runs of LagKV too."""

ORDINARY_RATIO = 0.4

MARGIN = 20
"""One part in so many at either end of a prompt belongs to no shot."""

SHOT_SIZES = (9, 14, 1, 23, 6)

CORNERS = 24
"""States of either kind; a value is among so many divided by the number of its alternatives."""

PROTECTED: tuple[Callable[[int], Sequence[int]], ...] = (
    lambda length: (),
    lambda length: (length - 1,),
    lambda length: (0, length - 1),
    lambda length: (length // 2,),
    lambda length: range(0, length, 4),
    lambda length: range(0, length - 1, 12),
)
PASSAGES = ((), ("template", "system", "shot", "question"), ("document", "template", "question"))
UNITS: tuple[Callable[[int], tuple[Unit, ...]], ...] = (
    lambda length: ((range(length),),),
    lambda length: tuple((range(at, at + 1),) for at in range(length)),
    lambda length: _shots(0, length),
    lambda length: _shots(length // MARGIN, max(1, length - length // MARGIN)),
    lambda length: _two_spans(length),
    lambda length: (),
)

PROMPT_CORNERS: Mapping[str, Sequence[Any]] = {
    "length": (48, 2, 32, 97, 33, 17, 47, 3, 64, 40, 1, 130),
    "ratio": (0.5, 0.25, 0.9, 0.1, 0.75, 0.95),
    "heads": (1, 2, 3, 4),
    "group": (1, 2, 3, 4, 7),
    "size": (4, 2, 8, 16),
    "dtype": DTYPES,
    "texture": tuple(TEXTURES),
    "place": ((0, 1), (3, 4), (1, 4), (DEEP - 1, DEEP), (0, 3), (1, 2)),  # layer, of how many
    "protected": PROTECTED,
    "passages": PASSAGES,
    "units": UNITS,
    "special": ((), (0,), (0, 1, 2)),
    "punctuation": (0, 0.2, 1),
    "alive": (0.3, 0.7, 1),
    "heads_last": (False, True),
}

STEP_CORNERS: Mapping[str, Sequence[Any]] = {
    "rows": (3, 1, 2),
    "ratio": (0.5, 0.25, 0.95, 0.05),
    "heads": (1, 2, 3, 4),
    "group": (1, 2, 4, 7),
    "slots": (10, 5, 99, 1, 2, 40),
    "full": (False, True),
    "texture": tuple(TEXTURES),
    "alike": (False, True),
    "tokens": (1, 10),
    "far": (1, 50, 200),
    "paid": (1, 3, 99),
    "protected": (0.5, 0, None, 1),
}


def ordinary_prompts(*, narrowed: bool = False) -> tuple[LayerState, ...]:
    """Return prompts of two models; the second is as long as the first, and of its model.

    ``narrowed``: earlier layers have dropped a part of each.
    """
    alive = 0.7 if narrowed else None
    deep = {"heads": 3, "group": 1, "layer": DEEP - 1, "layers": DEEP, "dtype": DTYPES[1]}
    return (
        _prompt(LONGEST, seed=1, layer=1, layers=4, alive=alive),
        _prompt(LONGEST, seed=2, layer=1, layers=4, alive=alive),
        _prompt(200, seed=3, texture="outliers", heads_last=True, alive=alive, **deep),
    )


def corner_prompts(
    *, narrowed: bool = False, need_units: bool = False
) -> tuple[tuple[LayerState, float], ...]:
    """Return prompts that have every corner of `PROMPT_CORNERS`, each with a keep ratio."""
    units = UNITS[:-1] if need_units else UNITS
    found = []
    for seed, corner in enumerate(_balanced({**PROMPT_CORNERS, "units": units})):
        length, ratio, (layer, layers) = (corner.pop(key) for key in ("length", "ratio", "place"))
        for key in ("protected", "units"):
            corner[key] = corner[key](length)
        corner["passages"] = _passages(corner["passages"], length)
        corner["special"] = [at for at in corner["special"] if at < length]
        corner["alive"] = corner["alive"] if narrowed else None
        state = layer_state(length, seed=seed, layer=layer, layers=layers, **corner)
        found.append((state, ratio))
    return tuple(found)


def corner_steps(*, sums: bool) -> tuple[DecodeState, ...]:
    """Return steps of answers that have every corner of `STEP_CORNERS`."""
    found = []
    for seed, corner in enumerate(_balanced(STEP_CORNERS)):
        ratios = [corner.pop("ratio"), 0.5, 0.3][: corner.pop("rows")]
        found.append(decode_state(seed=seed, ratios=ratios, sums=sums, **corner))
    return tuple(found)


def _balanced(corners: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return `CORNERS` combinations in which each value of a field is equally frequent."""
    shuffle = random.Random(0).shuffle  # a generator of its own
    columns = {}
    for field, values in corners.items():
        column = [values[index % len(values)] for index in range(CORNERS)]
        shuffle(column)
        columns[field] = column
    return [{field: column[index] for field, column in columns.items()} for index in range(CORNERS)]


def _prompt(length: int, **model: Any) -> LayerState:
    margin = max(1, length // MARGIN)
    parts = [("system", 0, margin), ("shot", margin, length - margin)]
    parts.append(("question", length - margin, length))
    return layer_state(
        length,
        protected=(0, length - 1),
        units=_shots(margin, length - margin),
        passages=tuple(Passage(kind, range(*ends)) for kind, *ends in parts),
        special=(0, margin),
        **model,
    )


def _passages(kinds: Sequence[str], length: int) -> tuple[Passage, ...]:
    """Cut a prompt into as many parts; of a prompt too short for that there are none."""
    if length < len(kinds):
        return ()
    ends = [length * index // max(1, len(kinds)) for index in range(len(kinds) + 1)]
    return tuple(
        Passage(kind, range(*span)) for kind, span in zip(kinds, pairwise(ends), strict=True)
    )


def _two_spans(length: int) -> tuple[Unit, ...]:
    """Return a unit in two spans around another, or the whole of a prompt too short for that."""
    third = length // 3
    if not third:
        return ((range(length),),)
    return ((range(third), range(2 * third, length)), (range(third, 2 * third),))


def _shots(start: int, stop: int) -> tuple[Unit, ...]:
    units: list[Unit] = []
    sizes = cycle(SHOT_SIZES)
    while start < stop:
        end = min(stop, start + next(sizes))
        units.append((range(start, end),))
        start = end
    return tuple(units)
