"""Whole pytest runs over a stand-in model. See stand_in.py."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Runs inside this process forget the modules that they are the first to import: these are costly.
import hypothesis.strategies  # noqa: F401
import pytest
import rich.console
import rich.table  # noqa: F401
import scipy.optimize
import scipy.special
import scipy.stats  # noqa: F401
from huggingface_hub import constants

import pytest_kvguard.harness.cache
import pytest_kvguard.harness.compare
import pytest_kvguard.harness.measure  # noqa: F401
from pytest_kvguard import policies, tasks
from tests.plugin import stand_in


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return stand_in.save(tmp_path_factory.mktemp("model") / "tiny")


@dataclass(frozen=True)
class Suite:
    """A folder of tests to run, against the stand-in model unless another is named."""

    pytester: pytest.Pytester
    model: Path

    def __call__(self, *args: str, **how: Any) -> pytest.RunResult:
        """Run pytest in this process, with the policies and tasks this package ships."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policies, "POLICIES", dict(policies.POLICIES))
            patch.setattr(tasks, "TASKS", dict(tasks.TASKS))
            return self.pytester.runpytest_inprocess(f"--kv-model={self.model}", *args, **how)

    def cells(self, *args: str) -> list[dict[str, Any]]:
        """Run pytest and return the cells of the report file."""
        self("--kv-report=kv.json", *args)
        return self.report()["cells"]

    def report(self) -> dict[str, Any]:
        return json.loads((self.pytester.path / "kv.json").read_text(encoding="utf-8"))


@pytest.fixture
def suite(pytester, model_folder, monkeypatch) -> Suite:
    """A folder where the task ``recall`` is known."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("recall.py", "questions.json"):
        shutil.copy(model_folder / name, pytester.path)
    pytester.makeconftest(
        """
        from recall import recall

        def pytest_kvguard_tasks():
            return {"recall": recall}
        """
    )
    return Suite(pytester, model_folder)
