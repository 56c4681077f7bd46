"""The summary at the end of a run, as lines of text."""

import textwrap
from collections.abc import Sequence
from io import StringIO

from pytest_kvguard.report.record import Cell
from pytest_kvguard.report.rows import HEADER, TEXT_COLUMNS, legend, reasons, row, tally

STYLES = {
    "pass": "green",
    "inconclusive": "yellow",
    "skipped": "dim",
    "refused": "magenta",
    "FAIL": "bold red",
}
"""By verdict as it is shown."""

NARROWEST = 14
"""Columns of text are folded to this width, no further."""


def table(cells: Sequence[Cell], *, width: int = 100, color: bool = False) -> list[str]:
    """Return the table, its legend, the reasons and the tally, as lines; none without cells.

    Numbers are never folded or cut: rows are as wide as those need, even beyond ``width``.
    ``color`` adds ANSI codes to the rows.
    """
    if not cells:
        return []
    return [
        *_grid([row(cell) for cell in cells], width, color),
        "",
        *textwrap.wrap(legend(cells), width),
        *(line for reason in reasons(cells) for line in _hanging(reason, width)),
        "",
        tally(cells),
    ]


def _grid(rows: Sequence[tuple[str, ...]], width: int, color: bool) -> list[str]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    least = len(HEADER) - 1  # gaps
    for name, values in zip(HEADER, zip(*rows, strict=True), strict=True):
        longest = max(len(name), *map(len, values))
        least += min(longest, NARROWEST) if name in TEXT_COLUMNS else longest
        grid.add_column(
            name,
            justify="left" if name in (*TEXT_COLUMNS, "verdict") else "right",
            no_wrap=name not in TEXT_COLUMNS,
            overflow="fold",
        )
    for *numbers, verdict in rows:
        # Text, not str: rich reads square brackets in a str as markup.
        grid.add_row(*map(Text, numbers), Text(verdict, STYLES[verdict]))
    console = Console(
        file=StringIO(),
        width=max(width, least),
        color_system="standard" if color else None,
    )
    with console.capture() as capture:
        console.print(grid)
    return [line.rstrip() for line in capture.get().splitlines()]


def _hanging(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ")
