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

NARROWEST = 15
"""Columns of text are folded to this width, no further."""


def table(cells: Sequence[Cell], *, width: int = 100, color: bool = False) -> list[str]:
    """Return the table, its legend, the reasons and the tally, as lines; none without cells.

    Numbers are never folded or cut: rows are as wide as those need, even beyond ``width``.
    ``color`` adds ANSI codes to the rows.
    """
    if not cells:
        return []
    return [
        *_grid(cells, width, color),
        "",
        *textwrap.wrap(legend(cells), width),
        *(line for reason in reasons(cells) for line in _hanging(reason, width)),
        "",
        tally(cells),
    ]


def _grid(cells: Sequence[Cell], width: int, color: bool) -> list[str]:
    """Draw the rows, those of an ability together under its name."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    abilities = list(dict.fromkeys(cell["ability"] for cell in cells))
    rows = [row(cell) for cell in cells]
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
    for ability in abilities:
        if ability:
            grid.add_row(Text(ability.upper(), "bold"))
        for cell, (*texts, verdict) in zip(cells, rows, strict=True):
            if cell["ability"] == ability:
                # Text, not str: rich reads square brackets in a str as markup.
                grid.add_row(*map(Text, texts), Text(verdict, STYLES[verdict]))
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
