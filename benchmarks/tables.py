"""The tables of ``gpu.py``: in a terminal, and in Markdown."""

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


@dataclass
class Report:
    """Rows of both tables, and what they were measured on."""

    setting: Row
    grid: list[Row] = field(default_factory=list)
    decode: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # and why


GRID = {
    "side": "side", "seconds": "seconds", "first_seconds": "first time", "baselines": "baselines",
    "faster_than_generate_per_cell": "times generate() per cell", "forwards": "passes",
    "tokens": "tokens", "joules": "J", "peak_bytes": "peak MiB",
}  # fmt: skip
DECODE = {
    "policy": "policy", "rows": "rows", "read": "read", "ms_a_step": "ms a token",
    "ms_a_step_in_all": "with capture", "tokens_a_second": "tokens a second",
    "roofline_ms": "roofline ms", "rooflines": "times roofline", "held_first_bytes": "KV MiB",
    "held_last_bytes": "at the end", "joules_a_token": "J a token", "peak_bytes": "peak MiB",
}  # fmt: skip
METERS = ("joules", "joules_a_token", "peak_bytes")  # that not every machine has


def parts(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return each table that has rows: its title, its columns, and its texts row by row."""
    found = []
    for title, rows, names in (("grid", report.grid, GRID), ("decode", report.decode, DECODE)):
        if rows:
            columns = {
                name: column
                for name, column in names.items()
                if name not in METERS or any(row.get(name) is not None for row in rows)
            }
            texts = [[shown(name, row.get(name)) for name in columns] for row in rows]
            found.append((title, list(columns.values()), texts))
    return found


def shown(name: str, value: Any) -> str:
    """Write one number; bytes in MiB."""
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.1f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def remarks(report: Report) -> list[str]:
    """Say what is missing, and why."""
    rows = [*report.grid, *report.decode]
    meters = {"energy": METERS[:2], "peak memory": METERS[2:]}
    blind = [
        what
        for what, names in meters.items()
        if all(row.get(name) is None for row in rows for name in names)
    ]
    return [*(f"{what}: not measured" for what in blind), *report.left_out]


def setting(report: Report) -> str:
    """Say in one line what was measured, on what."""
    on = report.setting
    return (
        f"{on['shape']} in {on['dtype']} on {on['device']}, torch {on['torch']}, transformers "
        f"{on['transformers']}; measured bandwidth {on['bandwidth_bytes_a_second'] / 1e9:,.3g} "
        f"GB/s, weights read a step {on['weight_bytes_a_step'] / 1e9:.3g} GB; grid: "
        f"{on['prompts']} x {on['length']} tokens read, {on['new']} written; decode: {on['write']} "
        f"written, keep ratio {on['decode_ratio']:g}"
    )


def markdown(report: Report) -> str:
    """Return both tables, what they were measured on above and what is missing below."""
    lines = [setting(report)]
    for _, columns, texts in parts(report):
        lines += ["", f"| {' | '.join(columns)} |", f"|---|{'--:|' * (len(columns) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in texts]
    return "\n".join([*lines, "", *(f"- {remark}" for remark in remarks(report))]) + "\n"


def show(report: Report, console: Console) -> None:
    """Print both tables on a terminal."""
    console.print(setting(report))
    for title, columns, texts in parts(report):
        table = Table(title=title)
        for at, column in enumerate(columns):
            table.add_column(column, justify="right" if at else "left", min_width=4)
        for row in texts:
            table.add_row(*row)
        console.print(table)
    for remark in remarks(report):
        console.print(f"- {remark}")
