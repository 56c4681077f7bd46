"""One cell as JSON: what other tools, other processes and the tables read. See docs/report.md."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.specs import Spec

if TYPE_CHECKING:
    from pytest_kvguard.harness.compare import Comparison
    from pytest_kvguard.harness.records import Run

SCHEMA = 1
"""Goes up when a field changes its meaning or goes away, not when one is added."""


class Cell(TypedDict):
    """One comparison. None stands for what is undefined, unbounded or was not measured."""

    model: str
    ability: str
    task: str
    policy: str
    spec: str
    params: dict[str, Any]
    ratio: float
    protocol: str
    units: str | None
    n: int
    base: float | None
    kept: float | None
    dp: float | None
    interval: list[float | None]
    level: float
    broke: list[str]
    mended: list[str]
    saves: str | None
    held: dict[str, float] | None
    read: float | None
    bytes_full: int
    bytes_held: int
    verdict: str
    skipped: bool
    reason: str
    max_drop: float
    samples_needed: int | None
    fidelity: dict[str, float | None] | None
    endings: dict[str, int] | None
    counts: dict[str, int]
    seconds: float


def to_cell(comparison: "Comparison", *, model: str = "", spec: str | None = None) -> Cell:
    """Return the comparison as plain values that JSON can hold.

    model: what was tested; spec: the policy as it was asked for, its name when None.
    """
    c, kept = comparison, comparison.kept
    low, high = (None, None) if c.refusal else c.interval
    cell = Cell(
        model=model,
        ability=kept.ability,
        task=kept.task,
        policy=kept.policy,
        spec=kept.policy if spec is None else spec,
        params=dict(kept.params),
        ratio=kept.ratio,
        protocol=kept.protocol,
        units=kept.units,
        n=c.n,
        base=c.base.mean,
        kept=kept.mean,
        dp=c.observed,
        interval=[low, high],
        level=c.level,
        broke=list(c.broke),
        mended=list(c.mended),
        saves=kept.saves,
        held=dataclasses.asdict(c.held) if c.held else None,
        read=kept.read,
        bytes_full=kept.bytes_full,
        bytes_held=kept.bytes_held,
        verdict=c.verdict,
        skipped=c.weakness is not None,
        reason=c.reason,
        max_drop=c.max_drop,
        samples_needed=c.samples_needed,
        fidelity=dataclasses.asdict(kept.fidelity) if kept.fidelity else None,
        endings=kept.endings if kept.answers else None,
        counts=dataclasses.asdict(kept.counts),
        seconds=kept.seconds,
    )
    finite: Cell = _finite(cell)
    return finite


def not_run(
    base: "Run", spec: Spec, ratio: float, *, model: str, max_drop: float, reason: str
) -> Cell:
    """Return a cell that was given up before it ran, for the reason that is given."""
    cell = Cell(
        model=model,
        ability=base.ability,
        task=base.task,
        policy=spec.names,
        spec=str(spec),
        params=dict(spec.params),
        ratio=ratio,
        protocol=base.protocol,
        units=None,
        n=len(base.scores),
        base=base.mean,
        kept=None,
        dp=None,
        interval=[None, None],
        level=0.90,
        broke=[],
        mended=[],
        saves=None,
        held=None,
        read=None,
        bytes_full=base.bytes_full,
        bytes_held=0,
        verdict="refused",
        skipped=True,
        reason=reason,
        max_drop=max_drop,
        samples_needed=None,
        fidelity=None,
        endings=base.endings if base.answers else None,
        counts=dataclasses.asdict(base.counts),
        seconds=0.0,
    )
    finite: Cell = _finite(cell)
    return finite


def write_report(
    path: Path, model: str, versions: Mapping[str, str], cells: Iterable[Cell]
) -> None:
    """Write all cells of a session as one JSON file, whole or not at all.

    Raises InvalidArgument where the folder does not exist.
    """
    if not path.parent.is_dir():
        raise InvalidArgument(
            f"cannot write the report {path}: there is no folder {path.parent}; make it first"
        )
    document = {
        "schema": SCHEMA,
        "model": model,
        "versions": dict(versions),
        "cells": list(cells),
    }
    text = json.dumps(_finite(document), indent=1, allow_nan=False, default=str)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text + "\n", encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """Return the value with None for every number that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return value
