"""The summary as Markdown, for the job summary of a CI service."""

from collections.abc import Iterable, Sequence

from pytest_kvguard.report.record import Cell
from pytest_kvguard.report.rows import HEADER, TEXT_COLUMNS, legend, one_line, reasons, row, tally

SPECIAL = "\\|*_~<`[#&$"
"""What Markdown, or what a CI service adds to it, reads as more than itself, wherever it stands."""


def markdown(cells: Sequence[Cell], *, model: str, complete: bool = True) -> str:
    """Return a heading, the tally, the table, the reasons and the legend; "" without cells.

    complete: whether the session ran to its end; if not, the tally says so.
    """
    if not cells:
        return ""
    aligned = [":--" if name in (*TEXT_COLUMNS, "verdict") else "--:" for name in HEADER]
    early = "" if complete else " The run ended early: cells may be missing."
    lines = [
        f"### KV-cache compression: {_escape(one_line(model))}",
        "",
        f"**{tally(cells)}**{early}",
        "",
        _line(HEADER),
        _line(aligned),
        *(_line(map(_escape, row(cell))) for cell in cells),
        "",
        *(f"- {_at_start(_escape(reason))}" for reason in reasons(cells)),
        "",
        f"<sub>{legend(cells)}</sub>",
    ]
    return "\n".join(lines) + "\n"


def _line(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def _escape(text: str) -> str:
    """Return one line of text that Markdown shows as it is, in one table cell."""
    return "".join(f"\\{char}" if char in SPECIAL else char for char in text)


def _at_start(text: str) -> str:
    """Keep what begins a list item from being read as another list's mark."""
    number = text[: len(text) - len(text.lstrip("0123456789"))]
    mark = text[len(number) : len(number) + 1]
    if mark in ("-", "+", ">") or (number and mark in (".", ")")):
        return f"{number}\\{text[len(number) :]}"
    return text
