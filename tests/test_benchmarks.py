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


def test_the_benchmark_of_a_gpu_runs_on_a_cpu(monkeypatch, capfd, tmp_path):
    sizes = ["--shape=tiny", "--device=cpu", "--dtype=float32", "--prompts=2", "--length=128"]
    sizes += ["--new=3", "--rows=1,2", "--read=128", "--write=6", "--runs=1", "--minutes=5"]
    policies = ["--policies=streaming_llm,snapkv", "--ratios=0.5", "--decode-policies=h2o,kivi"]
    written = [f"--json={tmp_path / 'gpu.json'}", f"--markdown={tmp_path / 'gpu.md'}"]
    run(monkeypatch, "gpu.py", *sizes, *policies, *written)
    report = json.loads((tmp_path / "gpu.json").read_text())
    sides = {row["side"]: row for row in report["grid"]}
    assert list(sides) == [
        "baseline alone", "grid of 2 cells", "generate()", "generate() once per cell"
    ]  # fmt: skip
    assert sides["generate() once per cell"]["seconds"] == 2 * sides["generate()"]["seconds"]
    assert sides["grid of 2 cells"]["tokens"] > sides["baseline alone"]["tokens"] >= 2 * (128 + 3)
    decoded = {(row["policy"], row["rows"]): row for row in report["decode"]}
    names = ["generate(), static cache", "full", "h2o", "kivi"]
    assert list(decoded) == [*((n, r) for r in (1, 2) for n in names), ("the grid's cells", 4)]
    assert all(row["ms_a_step"] > 0 and row["roofline_ms"] > 0 for row in decoded.values())
    full, h2o = decoded["full", 1], decoded["h2o", 1]
    token = 2 * 2 * 2 * 16 * 4  # layers, heads, key and value, channels, bytes
    assert full["held_first_bytes"] == 127 * token  # the last token is fed again
    assert full["held_last_bytes"] == (127 + 6) * token
    assert h2o["held_first_bytes"] == 31 * token
    assert h2o["held_last_bytes"] <= 32 * token
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} | 2 | 128 |" in text for name in names)
    assert "- energy: not measured" in text or "J a token" in text
    assert capfd.readouterr().out.count("└") == 2  # two tables


def test_error_rates_are_a_table_of_percentages_before_and_after(monkeypatch, capfd):
    run(monkeypatch, "error_rates.py", "--draws=20", "--rows=2")
    _, _, *rows = capfd.readouterr().out.strip().splitlines()
    alone, shared = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    assert alone[:5] == ["0/1", "100", "100", "-", "0.9"]
    assert shared[:5] == ["0/1", "100", "20", "0.05", "0.9"]
    assert all(re.fullmatch(r"\d+\.\d", cell) for cell in alone[5:])  # nothing to tell apart
    assert all(re.fullmatch(r"\d+\.\d( -> \d+\.\d)?", cell) for cell in shared[5:])
    assert any("->" in cell for cell in shared[5:])
