import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.harness.compare import Comparison
from pytest_kvguard.harness.records import FULL, Answer, Counts, Fidelity, Held, Run
from pytest_kvguard.report.record import Cell, to_cell, write_report

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "report.md"


def run(policy, right, n=40, **more):
    scores = {f"s{i:02}": float(i < right) for i in range(n)}
    return Run(
        "retrieval",
        policy,
        more.pop("params", {}),
        more.pop("ratio", 1.0),
        "prompt",
        scores,
        **more,
    )


KEPT = {"ratio": 0.25, "held": Held(0.2, 0.24, 0.25)}


def compared(base=30, kept=29, n=40, **more):
    return Comparison(run(FULL, base, n), run("snapkv", kept, n, **KEPT | more), max_drop=0.1)


def documented(heading):
    section = (
        DOCUMENTATION.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    )
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def test_the_documentation_lists_exactly_the_fields_of_a_cell():
    assert documented("A cell") == list(to_cell(compared())) == list(Cell.__annotations__)


def test_the_documentation_lists_exactly_the_fields_of_the_document(tmp_path):
    write_report(tmp_path / "kv.json", "tiny", {}, [])
    assert documented("The document") == list(json.loads((tmp_path / "kv.json").read_text()))


def test_a_cell_says_what_the_comparison_says():
    c = compared(
        params={"window": 16},
        bytes_full=800,
        bytes_held=200,
        fidelity=Fidelity(kl=0.5, agreement=0.75),
        answers={
            "s00": Answer("18", 2, stopped=True),
            "s01": Answer("1", 9, stopped=False),
            "s02": Answer("", 9, stopped=False, trace="2 * 9"),
            "s03": Answer("1 1 1", 9, stopped=False, looped=True),
        },
        counts=Counts(1, 2, 3),
        seconds=4.5,
    )
    assert to_cell(c, model="tiny", spec="snapkv(window=16)") == {
        "model": "tiny",
        "ability": "",
        "task": "retrieval",
        "policy": "snapkv",
        "spec": "snapkv(window=16)",
        "params": {"window": 16},
        "ratio": 0.25,
        "protocol": "prompt",
        "units": None,
        "n": 40,
        "base": 0.75,
        "kept": 0.725,
        "dp": -1 / 30,
        "interval": list(c.interval),
        "level": 0.9,
        "broke": ["s29"],
        "mended": [],
        "saves": "positions",
        "held": {"min": 0.2, "mean": 0.24, "max": 0.25},
        "read": None,
        "bytes_full": 800,
        "bytes_held": 200,
        "verdict": "inconclusive",
        "skipped": False,
        "reason": c.reason,
        "max_drop": 0.1,
        "samples_needed": c.samples_needed,
        "fidelity": {"kl": 0.5, "agreement": 0.75},
        "endings": {"ended": 1, "truncated": 2, "looped": 1},
        "counts": {"prefills": 1, "forwards": 2, "tokens": 3, "own_prefills": 0},
        "seconds": 4.5,
    }


def test_a_refused_cell_shows_what_was_observed_but_proves_nothing():
    cell = to_cell(compared(held=None))
    assert (cell["dp"], cell["interval"], cell["held"]) == (-1 / 30, [None, None], None)
    assert cell["verdict"] == "refused"
    assert "was not measured" in cell["reason"]


def test_a_cell_without_samples_has_no_means():
    cell = to_cell(compared(0, 0, n=0))
    assert (cell["n"], cell["base"], cell["kept"]) == (0, None, None)


def test_nothing_in_a_cell_or_a_report_is_beyond_json(tmp_path):
    cell = to_cell(compared(fidelity=Fidelity(kl=math.inf, agreement=math.nan)))
    assert cell["fidelity"] == {"kl": None, "agreement": None}
    odd = cell | {"params": {"sinks": (4, math.inf), "where": Path("a")}}
    write_report(tmp_path / "kv.json", "tiny", {}, [odd])
    text = (tmp_path / "kv.json").read_text(encoding="utf-8")
    (read,) = json.loads(text, parse_constant=pytest.fail)["cells"]
    assert read["params"] == {"sinks": [4, None], "where": "a"}


def test_a_report_reads_back_as_it_was_written(tmp_path, cells):
    write_report(tmp_path / "kv.json", "tiny", {"torch": "2.13"}, iter(cells))
    assert json.loads((tmp_path / "kv.json").read_text(encoding="utf-8")) == {
        "schema": 1,
        "model": "tiny",
        "versions": {"torch": "2.13"},
        "cells": cells,
    }


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, cells, monkeypatch):
    path = tmp_path / "kv.json"
    path.write_text("old")

    def full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(path, "tiny", {}, cells)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_for_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(InvalidArgument, match=r"there is no folder .*nowhere; make it first"):
        write_report(tmp_path / "nowhere" / "kv.json", "tiny", {}, [])


def test_reports_need_no_torch():
    code = (
        "import sys, pytest_kvguard.report.table, pytest_kvguard.report.markdown, "
        "pytest_kvguard.harness.compare; "
        "print({'torch', 'transformers', 'rich', 'scipy'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
