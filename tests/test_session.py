"""What is run together, what is run once, and what with. No model is asked."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pytest_kvguard import models
from pytest_kvguard.harness.measure import Bench, Measured
from pytest_kvguard.harness.records import FULL, Held, Run
from pytest_kvguard.marker import Plan
from pytest_kvguard.options import Settings
from pytest_kvguard.progress import no_progress
from pytest_kvguard.session import CellName, Session
from pytest_kvguard.specs import parse
from pytest_kvguard.tasks.base import Task

SETTINGS = Settings(
    policies=(),
    ratios=(),
    tasks={},
    model="reasoner",
    limit=None,
    max_drop=None,
    mode="gate",
    protocol=None,
    protect=(),
    units=None,
    report=None,
    device="cpu",
    dtype="float32",
    memory=2**20,
)
HALF, QUARTER = (CellName(parse("tova"), ratio) for ratio in (0.5, 0.25))
OTHER = CellName(parse("shotkv"), 0.5)
BASE = Run("sums", FULL, {}, 1.0, "prompt", {f"s{i}": 1.0 for i in range(50)})


def task(name: str = "sums") -> Task:
    return Task(name, "arithmetic", (), lambda *_: 1.0, max_new_tokens=1)


def plan(asked: Task, **changes) -> Plan:
    common = Plan(asked, (), (), max_drop=0.1, limit=None, units="shots")
    return replace(common, **changes)


def model(name: str = "tiny"):
    return SimpleNamespace(name=name)


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the benches, call by call: the model, the ratios and the keywords."""
    calls = []

    def make(loaded, *, memory):
        def measure(task, cells, **how):
            calls.append((loaded.name, [cell.ratio for cell in cells], how | {"memory": memory}))
            runs = [
                replace(
                    BASE, policy=cell.policy.name, ratio=cell.ratio, held=Held(0, 0, cell.ratio)
                )
                for cell in cells
            ]
            return Measured(BASE, tuple(runs))

        return SimpleNamespace(measure=measure)

    monkeypatch.setattr("pytest_kvguard.harness.measure.Bench", make)
    return calls


def ask(session: Session, loaded, plan: Plan, cell: CellName):
    return session.measure(loaded, plan, cell, lambda title: no_progress)


def test_cells_that_were_asked_for_are_run_together_each_once(asked):
    session, sums = Session(SETTINGS), plan(task())
    for cell in (HALF, QUARTER, HALF):
        session.ask(sums, cell)
    loaded = model()
    found = [ask(session, loaded, sums, cell) for cell in (HALF, QUARTER, HALF)]
    assert [ratios for _, ratios, _ in asked] == [[0.5, 0.25]]
    assert [each.comparison.kept.ratio for each in found] == [0.5, 0.25, 0.5]
    assert [each.cell["ratio"] for each in found] == [0.5, 0.25, 0.5]


def test_a_cell_nobody_announced_is_run_alone_and_what_is_known_is_not_run_again(asked):
    session, sums, loaded = Session(SETTINGS), plan(task()), model()
    session.ask(sums, HALF)
    ask(session, loaded, sums, OTHER)
    session.ask(sums, OTHER)
    session.ask(sums, QUARTER)
    ask(session, loaded, sums, HALF)
    assert [ratios for _, ratios, _ in asked] == [[0.5], [0.5, 0.25]]


@pytest.mark.parametrize("change", [{"limit": 3}, {"units": "sentences"}, {"task": task()}])
def test_what_asks_otherwise_is_another_measurement(asked, change):
    session, sums, loaded = Session(SETTINGS), plan(task()), model()
    for each in (sums, replace(sums, **change)):
        session.ask(each, HALF)
    for each in (sums, replace(sums, **change), sums):
        ask(session, loaded, each, HALF)
    assert [ratios for _, ratios, _ in asked] == [[0.5], [0.5]]


def test_each_limit_judges_the_same_measurement(asked):
    session, sums, loaded = Session(SETTINGS), plan(task()), model()
    found = [ask(session, loaded, replace(sums, max_drop=drop), HALF) for drop in (0.1, 0.2)]
    assert [each.comparison.max_drop for each in found] == [0.1, 0.2]
    assert len(asked) == 1


def test_two_models_in_one_session_are_measured_each(asked):
    session, sums = Session(SETTINGS), plan(task())
    loaded = [model("one"), model("two")]
    cells = [ask(session, each, sums, HALF).cell["model"] for each in (*loaded, loaded[0])]
    assert cells == ["one", "two", "one"]
    assert [name for name, *_ in asked] == ["one", "two"]


def test_the_settings_reach_the_measurement(asked):
    chosen = replace(SETTINGS, protocol="context", protect=("system",), memory=12345)
    ask(Session(chosen), model(), plan(task(), limit=7, units="sentences"), HALF)
    ((_, _, how),) = asked
    how.pop("progress")
    assert how == {
        "name": "sums",
        "limit": 7,
        "protocol": "context",
        "protect": ("system",),
        "units": "sentences",
        "memory": 12345,
    }


def test_a_bench_gives_its_engine_the_memory_it_was_given(imported):
    assert Bench(models.load("reasoner"), memory=12345).engine.memory == 12345


@pytest.mark.parametrize(("workers", "threads"), [(None, None), ("1", None), ("2", 4), ("32", 1)])
def test_workers_share_the_cores(monkeypatch, workers, threads):
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    if workers:
        monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", workers)
    chosen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(models, "load", lambda *named, **how: (named, how))
    loaded = Session(SETTINGS).load()
    assert loaded == (("reasoner",), {"device": "cpu", "dtype": "float32", "room": 2**20})
    assert chosen == ([] if threads is None else [threads])
