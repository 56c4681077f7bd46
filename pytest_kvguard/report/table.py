"""The summary at the end of a run, as lines of text."""

import textwrap
from collections.abc import Iterator, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from pytest_kvguard.report.record import Cell
from pytest_kvguard.report.rows import (
    HEADER,
    TEXT_COLUMNS,
    legend,
    one_line,
    reasons,
    row,
    tally,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

STYLES = {
    "pass": "green",
    "inconclusive": "yellow",
    "skipped": "dim",
    "refused": "magenta",
    "FAIL": "bold red",
}
"""By verdict as it is shown."""

NARROWEST = 15
"""Columns of text are folded to this width, no further; below it they get lines of their own."""

INDENT = 2
"""Of the numbers below a line of text, and of what goes on with a sentence, in columns."""

TEXTS = len(TEXT_COLUMNS)


def table(cells: Sequence[Cell], *, width: int = 100, color: bool = False) -> list[str]:
    """Return the table, its legend, the reasons and the tally, as lines; none without cells.

    Where a row does not fit, its task and policy stand on a line above its numbers. Numbers are
    never folded or cut: rows are as wide as those need, even beyond ``width``. ``color`` adds
    ANSI codes to the rows.
    """
    if not cells:
        return []
    return [
        *_grid(cells, width, color),
        "",
        *_hanging(legend(cells), width, indent=0),
        *(line for reason in reasons(cells) for line in _hanging(reason, width)),
        "",
        *_hanging(tally(cells), width),
    ]


def _grid(cells: Sequence[Cell], width: int, color: bool) -> list[str]:
    """Draw the rows, those of an ability together under its name."""
    from rich.cells import cell_len
    from rich.console import Console

    abilities = list(dict.fromkeys(cell["ability"] for cell in cells))
    cells = sorted(cells, key=lambda cell: abilities.index(cell["ability"]))
    rows = [row(cell) for cell in cells]
    widths = [max(map(cell_len, column)) for column in zip(HEADER, *rows, strict=True)]
    numbers = sum(widths[TEXTS:]) + len(widths[TEXTS:]) - 1
    if texts := _share(width - numbers - TEXTS, *widths[:TEXTS]):
        columns = [*texts, *widths[TEXTS:]]
        least = sum(texts) + TEXTS + numbers
    else:
        columns = widths[TEXTS:]
        columns[0] += max(0, min(INDENT, width - numbers))  # the first is flush right
        least = sum(columns) + len(columns) - 1
    console = Console(
        file=StringIO(),
        width=max(width, least),
        color_system="standard" if color else None,
    )
    headings = [one_line(cell["ability"]).upper() for cell in cells]
    with console.capture() as capture:
        for line in _lines(rows, headings, columns):
            console.print(line)
    return [line.rstrip() for line in capture.get().splitlines()]


def _share(room: int, task: int, policy: int) -> tuple[int, int] | None:
    """Share ``room`` between the columns of text; None where one would get too narrow."""
    if min(task, NARROWEST) + min(policy, NARROWEST) > room:
        return None
    task = min(task, max(room - policy, room // 2))  # the longer gives way
    return task, min(policy, room - task)


def _lines(
    rows: Sequence[tuple[str, ...]], headings: Sequence[str], columns: Sequence[int]
) -> "Iterator[RenderableType]":
    """Yield the header, the headings and the rows; texts above the numbers if not in columns."""
    from rich.text import Text

    above = len(HEADER) - len(columns)  # how many texts have no column
    if above:
        yield Text("  ".join(HEADER[:above]))
    yield _line(HEADER[above:], columns)
    last: tuple[str, ...] = ()
    heading = ""
    for values, ability in zip(rows, headings, strict=True):
        if ability != heading:
            yield Text(ability, "bold")
            heading, last = ability, ()
        if values[:above] != last:
            yield Text("  ".join(values[:above]))
            last = values[:above]
        yield _line(values[above:], columns)


def _line(values: Sequence[str], columns: Sequence[int]) -> "RenderableType":
    """Return one row of columns of these widths."""
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
    for name, width in zip(HEADER[-len(columns) :], columns, strict=True):
        line.add_column(
            width=width,
            justify="left" if name in (*TEXT_COLUMNS, "verdict") else "right",
            no_wrap=name not in TEXT_COLUMNS,
            overflow="fold",
        )
    # Text, not str: rich reads square brackets in a str as markup.
    line.add_row(*map(Text, values[:-1]), Text(values[-1], STYLES.get(values[-1], "")))
    return line


def _hanging(text: str, width: int, *, indent: int = INDENT) -> list[str]:
    hang = " " * indent
    return textwrap.wrap(text, width, subsequent_indent=hang, break_on_hyphens=False)
