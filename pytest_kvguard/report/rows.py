"""Cells in words: what the terminal and the Markdown table both say."""

import math
from collections.abc import Iterator, Sequence

from pytest_kvguard.report.record import Cell

TEXT_COLUMNS = ("task", "policy")
HEADER = (*TEXT_COLUMNS, "ratio", "held", "n", "base", "kept", "dP", "interval", "-/+", "verdict")
"""The columns of both tables; all but the first two hold numbers or the verdict."""

ORDER = ("pass", "inconclusive", "skipped", "refused", "fail")
"""How cells end: by their verdict, but for those of a task that is beyond the model."""


def row(cell: Cell) -> tuple[str, ...]:
    """Return the cell as one string for each column of HEADER; empty for what was not measured."""
    task = one_line(cell["task"])
    return (
        task if cell["protocol"] == "prompt" else f"{task} ({cell['protocol']})",
        _policy(cell),
        f"{cell['ratio']:g}",
        _held(cell),
        str(cell["n"]),
        _mark(cell["base"]),
        _mark(cell["kept"]),
        _percent(cell["dp"]),
        _interval(*cell["interval"]),
        "" if cell["kept"] is None else f"{len(cell['broke'])}/{len(cell['mended'])}",
        shown(end(cell)),
    )


def one_line(text: str) -> str:
    """Return text from elsewhere as one line of what can be printed.

    White space becomes one space; what cannot be printed is escaped as in a Python string.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in " ".join(text.split())
    )


def end(cell: Cell) -> str:
    """Return how a cell ended, one of ORDER."""
    return "skipped" if cell["skipped"] else cell["verdict"]


def shown(verdict: str) -> str:
    """Return an end as printed: a fail is loud."""
    return verdict.upper() if verdict == "fail" else verdict


def tally(cells: Sequence[Cell]) -> str:
    """Return how many cells came to which verdict: ``3 pass, 1 FAIL``."""
    counts = ", ".join(_counted(verdict, cells) for verdict in ORDER if _with(verdict, cells))
    empty = all(end(cell) in ("skipped", "refused") for cell in cells)
    return f"{counts}: nothing was proved" if cells and empty else counts


def reasons(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield a sentence for what has something to explain, fails first; cells alike share one."""
    for verdict in reversed(ORDER):
        alike: dict[tuple[str, str], list[str]] = {}
        for cell in _with(verdict, cells):
            if cell["reason"]:
                names = alike.setdefault((cell["task"], cell["reason"]), [])
                names.append(f"{_policy(cell)}@{cell['ratio']:g}")
        for (task, reason), names in alike.items():
            yield one_line(f"{task} {', '.join(names)}: {shown(verdict)}: {reason}")


def legend(cells: Sequence[Cell]) -> str:
    """Explain the columns, with the limit and the level where all cells have the same."""
    limits = {cell["max_drop"] for cell in cells}
    limit = f" (limit {-limits.pop():+z.1%})" if len(limits) == 1 else ""
    levels = {cell["level"] for cell in cells}
    level = f"{100 * levels.pop():g}%, " if len(levels) == 1 else ""
    shared = any(cell["clusters"] < cell["n"] for cell in cells)
    saved = {cell["saves"] for cell in cells}
    return (
        f"dP: relative change of the mean score{limit}, worse is negative; "
        f"interval: where the true dP lies ({level}paired by sample"
        f"{', clustered by context' * shared}); "
        f"held: share of the prompt left in the cache{', or of its bytes' * ('bytes' in saved)}"
        f"{', or of it what a step reads' * ('reads' in saved)}; -/+: samples that broke/mended"
    )


def _with(verdict: str, cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if end(cell) == verdict]


def _counted(verdict: str, cells: Sequence[Cell]) -> str:
    found = _with(verdict, cells)
    needed = [cell["samples_needed"] for cell in found if cell["samples_needed"]]
    more = f" (about {max(needed)} samples would decide)" if needed else ""
    return f"{len(found)} {shown(verdict)}{more}"


def _held(cell: Cell) -> str:
    """Return the share that was kept of what the policy saves."""
    if cell["saves"] == "bytes":
        full = cell["bytes_full"]  # 0: not one sample came to an end
        return f"{cell['bytes_held'] / full:.0%} bytes" if full else "?"
    if cell["saves"] == "reads" and cell["read"] is not None:
        return f"{cell['read']:.0%} read"
    return f"{cell['held']['mean']:.0%}" if cell["held"] else "?"


def _policy(cell: Cell) -> str:
    """Name the policy, and the units it keeps whole where they are not those of the task."""
    spec = one_line(cell["spec"])
    return spec if cell["units"] in (None, "shots") else f"{spec} ({cell['units']})"


def _mark(mean: float | None) -> str:
    return "" if mean is None else f"{mean:.3f}"


def _interval(low: float | None, high: float | None) -> str:
    """Return both ends; None is an end without a bound, two of them are no interval."""
    if low is None and high is None:
        return ""
    ends = (-math.inf if low is None else low, math.inf if high is None else high)
    return f"[{', '.join(map(_percent, ends))}]"


def _percent(change: float | None) -> str:
    return "" if change is None else f"{change:+z.1%}"
