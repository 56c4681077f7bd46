"""From the reports of tests, wherever they ran, to the summary of a session."""

import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pytest_kvguard.report.markdown import markdown
from pytest_kvguard.report.record import Cell, write_report

PROPERTY = "kvguard"
"""The user property that carries a test's measurements as JSON; it crosses processes."""

PACKAGES = ("pytest-kvguard", "torch", "transformers", "tokenizers", "pytest")


def collect(reports: Iterable[Any]) -> list[Cell]:
    """Read the cells off test reports, each test's once."""
    found: dict[tuple[str, str], Cell] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == PROPERTY:
                found[report.nodeid, value] = json.loads(value)
    return list(found.values())


def by_model(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Group cells by the model they were measured on."""
    models: dict[str, list[Cell]] = {}
    for cell in cells:
        models.setdefault(cell["model"], []).append(cell)
    return models


def publish(cells: Sequence[Cell], path: Path | None) -> Iterator[str]:
    """Write the report file, if one is asked for, and the job summary; yield what to tell of it."""
    if not cells:
        if path is not None:
            yield f"nothing was measured, so no report is written to {path}"
        return
    if path is not None:
        write(path, cells)
        yield f"report written to {path}"
    try:
        append_job_summary(cells)
    except OSError as problem:  # a container may inherit the variable without the file
        yield f"cannot append to the job summary: {problem}"


def write(path: Path, cells: Sequence[Cell]) -> None:
    """Write the report file; cells of several models name them all."""
    write_report(path, ", ".join(by_model(cells)), versions(), cells)


def append_job_summary(cells: Sequence[Cell]) -> None:
    """Append to the summary of a CI job where the service names a file for it."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    with Path(path).open("a", encoding="utf-8") as file:
        for model, of_model in by_model(cells).items():
            file.write(markdown(of_model, model=model))


def versions() -> dict[str, str]:
    """Say what made a measurement: Python and the packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
