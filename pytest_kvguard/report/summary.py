"""From the reports of tests, wherever they ran, to the summary of a session."""

import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

from pytest_kvguard.report.markdown import markdown
from pytest_kvguard.report.record import Cell, write_report

PROPERTY = "kvguard"
"""The user property that carries a test's measurements as JSON; it crosses processes."""

PACKAGES = ("pytest-kvguard", "torch", "transformers", "tokenizers", "pytest")


class Measured(TypedDict):
    """What a test leaves behind."""

    model: str
    cell: Cell


def packed(model: str, cell: Cell) -> str:
    """Write a measurement as the value of a user property."""
    return json.dumps(Measured(model=model, cell=cell))


def collect(reports: Iterable[Any]) -> list[Measured]:
    """Read the measurements off test reports, each test's once."""
    found: dict[tuple[str, str], Measured] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == PROPERTY:
                found[report.nodeid, value] = json.loads(value)
    return list(found.values())


def by_model(measured: Sequence[Measured]) -> dict[str, list[Cell]]:
    """Group cells by the model they were measured on."""
    models: dict[str, list[Cell]] = {}
    for one in measured:
        models.setdefault(one["model"], []).append(one["cell"])
    return models


def publish(measured: Sequence[Measured], path: Path | None) -> Iterator[str]:
    """Write the report file, if one is asked for, and the job summary; yield what to tell of it."""
    if not measured:
        if path is not None:
            yield f"nothing was measured, so no report is written to {path}"
        return
    if path is not None:
        write(path, measured)
        yield f"report written to {path}"
    try:
        append_job_summary(measured)
    except OSError as problem:  # a container may inherit the variable without the file
        yield f"cannot append to the job summary: {problem}"


def write(path: Path, measured: Sequence[Measured]) -> None:
    """Write the report file; cells of several models name them all."""
    models = by_model(measured)
    cells = [cell for of_model in models.values() for cell in of_model]
    write_report(path, ", ".join(models), versions(), cells)


def append_job_summary(measured: Sequence[Measured]) -> None:
    """Append to the summary of a CI job where the service names a file for it."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    with Path(path).open("a", encoding="utf-8") as file:
        for model, cells in by_model(measured).items():
            file.write(markdown(cells, model=model))


def versions() -> dict[str, str]:
    """Say what made a measurement: Python and the packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
