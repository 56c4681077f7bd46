"""From the reports of tests, wherever they ran, to the summary of a session."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from pytest_kvguard.report.document import write_report
from pytest_kvguard.report.markdown import markdown
from pytest_kvguard.report.record import Cell
from pytest_kvguard.report.rows import one_line
from pytest_kvguard.report.table import table

PROPERTY = "kvguard"
"""The user property that carries a test's measurements as JSON; it crosses processes."""

PACKAGES = ("pytest-kvguard", "torch", "transformers", "tokenizers", "pytest")


class Summary:
    """Gathers the cells of a session; a plugin where the session was started, not on workers.

    The report file is written anew with every cell, so that whatever ends the run leaves those
    that were measured until then.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._target = None if path is None else path.absolute()  # tests may change the folder
        self._cells: dict[tuple[str, str], Cell] = {}  # by test and by what it measured
        self._told: list[str] = []

    @property
    def cells(self) -> list[Cell]:
        """All cells so far, in the order they were reported in."""
        return list(self._cells.values())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Read the cells off a test's report, each once, and write them."""
        before = len(self._cells)
        for name, value in report.user_properties:
            if name == PROPERTY:
                self._cells.setdefault((report.nodeid, str(value)), json.loads(str(value)))
        if len(self._cells) > before:
            self._write(complete=False)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the report file and the job summary, however the session ended."""
        complete = _ran_to_its_end(session)
        if problem := self._write(complete=complete):
            self._told.append(f"cannot write the report {self.path}: {problem}")
            if session.exitstatus == pytest.ExitCode.OK:  # what was asked for is not there
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif self.path is not None and self._cells:
            early = "" if complete else ", without what the run did not get to"
            self._told.append(f"report written to {self.path}{early}")
        elif self.path is not None:
            self._told.append(f"nothing was measured, so no report is written to {self.path}")
        try:
            append_job_summary(self.cells, complete=complete)
        except OSError as problem:  # a container may inherit the variable without the file
            self._told.append(f"cannot append to the job summary: {problem}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show every cell that was measured, and say what was written."""
        for model, cells in by_model(self.cells).items():
            terminalreporter.section(f"KV-cache sensitivity of {one_line(model)}")
            width, color = terminalreporter._tw.fullwidth, terminalreporter._tw.hasmarkup
            for line in table(cells, width=width, color=color):
                terminalreporter.write_line(line)
        for line in self._told:
            terminalreporter.write_line(line)

    def _write(self, *, complete: bool) -> OSError | None:
        """Write the report file, if one is asked for and there is a cell; return what failed."""
        if self._target is None or not self._cells:
            return None
        models = ", ".join(by_model(self.cells))
        try:
            write_report(self._target, models, versions(), self.cells, complete=complete)
        except OSError as problem:  # tried again with the next cell, told at the end
            return problem
        return None


def _ran_to_its_end(session: pytest.Session) -> bool:
    """Whether every selected test was run."""
    ended = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    return ended and not session.shouldstop and not session.shouldfail


def by_model(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Group cells by the model they were measured on."""
    models: dict[str, list[Cell]] = {}
    for cell in cells:
        models.setdefault(cell["model"], []).append(cell)
    return models


def append_job_summary(cells: Sequence[Cell], *, complete: bool = True) -> None:
    """Append to the summary of a CI job where the service names a file for it."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path or not cells:
        return
    with Path(path).open("a", encoding="utf-8") as file:
        for model, of_model in by_model(cells).items():
            file.write(markdown(of_model, model=model, complete=complete))


def versions() -> dict[str, str]:
    """Say what made a measurement: Python and the packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
