"""The summary as Markdown, for the job summary of a CI service."""

from collections.abc import Iterable, Sequence

from pytest_kvguard.report.record import Cell
from pytest_kvguard.report.rows import HEADER, TEXT_COLUMNS, legend, reasons, row, tally


def markdown(cells: Sequence[Cell], *, model: str) -> str:
    """Return a heading, the tally, the table, the reasons and the legend; "" without cells."""
    if not cells:
        return ""
    aligned = [":--" if name in (*TEXT_COLUMNS, "verdict") else "--:" for name in HEADER]
    lines = [
        f"### KV-cache compression: {_escape(model)}",
        "",
        f"**{tally(cells)}**",
        "",
        _line(HEADER),
        _line(aligned),
        *(_line(map(_escape, row(cell))) for cell in cells),
        "",
        *(f"- {_escape(reason)}" for reason in reasons(cells)),
        "",
        f"<sub>{legend(cells)}</sub>",
    ]
    return "\n".join(lines) + "\n"


def _line(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is, in one table cell."""
    for special in "\\|*_<`[":
        text = text.replace(special, f"\\{special}")
    return text.replace("\n", " ")
