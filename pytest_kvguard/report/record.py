"""One cell as JSON: what other tools, other processes and the tables read. See docs/report.md."""

import dataclasses
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from pytest_kvguard.harness.compare import Comparison
    from pytest_kvguard.harness.records import Run


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
    clusters: int
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
    bytes_padding: int
    peak_bytes: int | None
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
        clusters=c.clusters,
        base=c.base.mean,
        kept=kept.mean,
        dp=c.observed,
        interval=list(c.observed_interval or (None, None)),
        level=c.level,
        broke=list(c.broke),
        mended=list(c.mended),
        saves=kept.saves,
        held=dataclasses.asdict(c.held) if c.held else None,
        read=kept.read,
        bytes_full=kept.bytes_full,
        bytes_held=kept.bytes_held,
        bytes_padding=kept.bytes_padding,
        peak_bytes=kept.peak_bytes,
        verdict=c.verdict,
        skipped=c.weakness is not None and c.mode != "proved",
        reason=c.reason,
        max_drop=c.max_drop,
        samples_needed=c.samples_needed,
        fidelity=dataclasses.asdict(kept.fidelity) if kept.fidelity else None,
        endings=kept.endings if kept.answers else None,
        counts=dataclasses.asdict(kept.counts),
        seconds=kept.seconds,
    )
    return _as_json(cell)


def not_run(
    base: "Run",
    kept: "Run",
    *,
    model: str,
    spec: str,
    max_drop: float,
    level: float,
    skipped: bool,
    reason: str,
) -> Cell:
    """Return a cell that was given up before it ran, for the reason that is given.

    base: what was measured of the baseline until then; kept: the run that was to be, without
    scores; skipped: whether its test is skipped rather than failed for that.
    """
    cell = Cell(
        model=model,
        ability=base.ability,
        task=base.task,
        policy=kept.policy,
        spec=spec,
        params=dict(kept.params),
        ratio=kept.ratio,
        protocol=base.protocol,
        units=kept.units,
        n=len(base.scores),
        clusters=len(set(base.contexts)),
        base=base.mean,
        kept=None,
        dp=None,
        interval=[None, None],
        level=level,
        broke=[],
        mended=[],
        saves=None,
        held=None,
        read=None,
        bytes_full=base.bytes_full,
        bytes_held=0,
        bytes_padding=0,
        peak_bytes=base.peak_bytes,
        verdict="refused",
        skipped=skipped,
        reason=reason,
        max_drop=max_drop,
        samples_needed=None,
        fidelity=None,
        endings=base.endings if base.answers else None,
        counts=dataclasses.asdict(kept.counts),
        seconds=0.0,
    )
    return _as_json(cell)


def _as_json(cell: Cell) -> Cell:
    plain: Cell = as_json(cell)
    return plain


def as_json(value: Any) -> Any:
    """Return the value as JSON has it: None for numbers without a word, else text for the rest."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return [as_json(inner) for inner in sorted(value, key=str)]
    return str(value)
