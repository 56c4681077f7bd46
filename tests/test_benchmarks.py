"""The benchmarks run; what they find is not judged here, for machines are noisy."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.usefixtures("imported")


def run(monkeypatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


def test_a_point_of_the_scaling_curves_counts_what_it_did(monkeypatch, capfd):
    point = {"cells": 3, "length": 64, "samples": 2, "new": 4}
    run(monkeypatch, "scaling.py", f"--point={json.dumps(point)}", "--threads=1")
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["prefills"] == 2
    assert found["tokens"] >= 2 * (64 + 4) + 3 * 2 * 4
    assert found["seconds"] > 0


def test_every_way_of_decoding_is_timed(monkeypatch, capfd):
    policies = "h2o,shotkv,adakv,quest,kivi"
    sizes = ["--prompt=128", "--new=4", "--runs=1", "--threads=1", "--ratio=0.5"]
    run(monkeypatch, "evicted.py", f"--policies={policies}", *sizes)
    rows = re.findall(
        r"^\| (\w+) \|.*\| ([\d.]+) \| ([\d.]+) \| [^|]*\|$", capfd.readouterr().out, re.M
    )
    assert [row[0] for row in rows] == ["full", *policies.split(",")]
    first = {name: float(mib) for name, mib, _ in rows}
    assert all(first[name] <= 0.6 * first["full"] for name in ("h2o", "shotkv", "adakv", "kivi"))
    assert first["quest"] == first["full"]
