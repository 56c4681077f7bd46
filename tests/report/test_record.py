import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from pytest_kvguard.harness.compare import Comparison
from pytest_kvguard.harness.records import FULL, Answer, Counts, Fidelity, Held, Run
from pytest_kvguard.report.record import Cell, not_run, to_cell
from tests.documents import documented_fields


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


def test_the_documentation_lists_exactly_the_fields_of_a_cell():
    assert documented_fields("A cell") == list(to_cell(compared())) == list(Cell.__annotations__)


def test_a_cell_says_what_the_comparison_says():
    c = compared(
        params={"window": 16},
        bytes_full=800,
        bytes_held=200,
        bytes_padding=30,
        peak_bytes=4000,
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
        "clusters": 40,
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
        "bytes_padding": 30,
        "peak_bytes": 4000,
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


def test_samples_are_counted_in_the_baseline():
    c = Comparison(run(FULL, 30), run("snapkv", 20, 25, **KEPT), max_drop=0.1)
    assert to_cell(c)["n"] == 40


def test_clusters_are_counted_where_samples_were_scored():
    shared = {f"s{i:02}": f"s{i - i % 4:02}" for i in range(60)}
    base = run(FULL, 30, clusters=shared)
    c = Comparison(base, run("snapkv", 29, **KEPT, clusters=shared), max_drop=0.1)
    assert (to_cell(c)["n"], to_cell(c)["clusters"]) == (40, 10)


def test_a_cell_without_samples_has_no_means():
    cell = to_cell(compared(0, 0, n=0))
    assert (cell["n"], cell["base"], cell["kept"]) == (0, None, None)


def test_nothing_in_a_cell_is_beyond_json():
    params = {
        "sinks": (4, math.inf),
        "where": Path("a"),
        "layers": {2, 1},
        "share": np.float32(0.5),
        "window": np.int64(8),
        "flag": True,
        3: None,
    }
    cell = to_cell(compared(fidelity=Fidelity(kl=math.inf, agreement=math.nan), params=params))
    assert cell["fidelity"] == {"kl": None, "agreement": None}
    assert json.loads(json.dumps(cell, allow_nan=False)) == cell
    assert cell["params"] == {
        "sinks": [4, None],
        "where": "a",
        "layers": [1, 2],
        "share": 0.5,
        "window": 8,
        "flag": True,
        "3": None,
    }


def test_weakness_skips_a_cell_unless_a_proof_was_asked_for():
    weak = compared(base=3, kept=3)
    assert weak.weakness
    assert to_cell(weak)["skipped"]
    assert not to_cell(replace(weak, mode="proved"))["skipped"]
    assert not to_cell(compared(held=None))["skipped"]  # a refusal is no weakness


def test_a_cell_that_was_given_up_says_what_there_was_and_nothing_else():
    base = run(FULL, 0, 20, bytes_full=800, counts=Counts(prefills=20, forwards=9, tokens=90))
    kept = replace(
        base,
        policy="snapkv",
        params={"window": 16},
        ratio=0.25,
        units="shots",
        counts=Counts(prefills=20),
    )
    asked = {"model": "tiny", "spec": "snapkv(window=16)", "max_drop": 0.2, "level": 0.8}
    cell = not_run(base, kept, **asked, skipped=True, reason="too weak")
    told = asked | {
        "task": "retrieval",
        "policy": "snapkv",
        "params": {"window": 16},
        "ratio": 0.25,
        "protocol": "prompt",
        "units": "shots",
        "n": 20,
        "clusters": 20,
        "base": 0.0,
        "bytes_full": 800,
        "bytes_held": 0,
        "bytes_padding": 0,
        "peak_bytes": None,
        "verdict": "refused",
        "skipped": True,
        "reason": "too weak",
        "counts": {"prefills": 20, "forwards": 0, "tokens": 0, "own_prefills": 0},
        "seconds": 0.0,
        "ability": "",
    }
    empty = {"broke": [], "mended": [], "interval": [None, None]}
    unknown = ("kept", "dp", "saves", "held", "read", "samples_needed", "fidelity", "endings")
    assert cell == told | empty | dict.fromkeys(unknown)
    assert list(cell) == list(Cell.__annotations__)


def test_reports_need_no_torch():
    code = (
        "import sys, pytest_kvguard.report.summary, "
        "pytest_kvguard.harness.compare; "
        "print({'torch', 'transformers', 'rich', 'scipy'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
