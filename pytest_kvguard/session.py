"""What one pytest session measures: tests ask for cells, a task's cells are run together."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_kvguard.errors import InvalidArgument, UnknownName
from pytest_kvguard.marker import Plan
from pytest_kvguard.options import Settings
from pytest_kvguard.progress import ProgressCallback
from pytest_kvguard.report.record import Cell, not_run, to_cell
from pytest_kvguard.specs import Spec

if TYPE_CHECKING:  # importing these costs seconds, which sessions without a kv test must not pay
    from pytest_kvguard.harness.compare import Comparison
    from pytest_kvguard.harness.measure import Bench, Measured
    from pytest_kvguard.models import Loaded
    from pytest_kvguard.tasks.base import Task

Announce = Callable[[str], ProgressCallback]
"""Title of a long piece of work -> who hears how far it is."""


@dataclass(frozen=True)
class CellName:
    """A policy at a ratio, as asked for."""

    policy: Spec
    ratio: float

    def __str__(self) -> str:
        return f"{self.policy}-{self.ratio:g}"


@dataclass(frozen=True)
class Measurement:
    """A cell as a test gets it: a comparison, or the reason why there is none to judge."""

    comparison: "Comparison | None"
    cell: Cell  # for the report
    weakness: str | None  # the model cannot do the task: skip


@dataclass
class Session:
    """Keeps what was measured, so that nothing is measured twice."""

    settings: Settings
    asked: dict[tuple[Any, ...], list[CellName]] = field(default_factory=dict)  # by _group
    _tasks: dict[str, "Task"] = field(default_factory=dict)
    _benches: dict[int, "Bench"] = field(default_factory=dict)
    _measured: dict[tuple[Any, ...], dict[CellName, "Measured"]] = field(default_factory=dict)

    def require_model(self) -> None:
        """Raise, before anything is measured, for a device or a model that cannot be had."""
        from pytest_kvguard.models import check, check_device

        check_device(self.settings.device)
        check(self.settings.model)

    def load(self) -> "Loaded":
        """Load the model the settings name; under xdist, workers share the cores."""
        import torch

        from pytest_kvguard.models import load

        if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) - 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // (workers + 1)))
        chosen = self.settings
        room = {} if chosen.memory is None else {"room": chosen.memory}
        return load(chosen.model, device=chosen.device, dtype=chosen.dtype, **room)

    def task(self, asked: Any) -> "Task":
        """Make the task a marker names, once."""
        from pytest_kvguard.tasks import get_task
        from pytest_kvguard.tasks.base import Task

        if isinstance(asked, Task):
            self._tasks.setdefault(_key(asked), asked)
        elif not isinstance(asked, Spec):
            raise InvalidArgument(f"a task is a name or a Task, got {asked!r}")
        elif _key(asked) not in self._tasks:
            self._tasks[_key(asked)] = get_task(asked)
        return self._tasks[_key(asked)]

    def check(self, plan: Plan) -> None:
        """Raise, before anything is run, for a task or policy nobody knows."""
        from pytest_kvguard.policies import get_policy
        from pytest_kvguard.tasks import TASKS

        for name in self.settings.tasks:
            if name not in TASKS:
                raise UnknownName("task", name, TASKS)
        self.task(plan.task)
        for policy in plan.policies:
            get_policy(policy)

    def ask(self, plan: Plan, cell: CellName) -> None:
        """Note that a selected test wants a cell, so that it is run with its siblings."""
        cells = self.asked.setdefault(_group(plan), [])
        if cell not in cells:
            cells.append(cell)

    def measure(
        self, loaded: "Loaded", plan: Plan, cell: CellName, progress: Announce
    ) -> Measurement:
        """Return a cell, running it and all its siblings that were asked for if need be."""
        from pytest_kvguard.harness.compare import Comparison
        from pytest_kvguard.harness.records import Counts
        from pytest_kvguard.policies import get_policy

        task = self.task(plan.task)
        done = self._measured.setdefault((id(loaded), *_group(plan)), {})
        if cell not in done:
            siblings = self.asked.get(_group(plan), [])
            wanted = siblings if cell in siblings else [cell]
            fresh = [name for name in wanted if name not in done]
            done.update(self._run(loaded, task, plan, fresh, progress))
        found = done[cell]
        base = found.baseline
        if found.given_up is not None:
            policy = get_policy(cell.policy)
            record = not_run(
                base,
                replace(
                    base,
                    policy=policy.name,
                    params=dict(policy.params),
                    ratio=cell.ratio,
                    units=plan.units if policy.keeps_units else None,
                    scores={},
                    counts=Counts(prefills=base.counts.prefills),
                ),
                model=loaded.name,
                spec=str(cell.policy),
                max_drop=plan.max_drop,
                level=Comparison.level,
                skipped=self.settings.mode != "proved",
                reason=found.given_up,
            )
            return Measurement(None, record, found.given_up)
        comparison = Comparison(base, found.runs[0], plan.max_drop, mode=self.settings.mode)
        record = to_cell(comparison, model=loaded.name, spec=str(cell.policy))
        return Measurement(comparison, record, comparison.weakness)

    def _run(
        self,
        loaded: "Loaded",
        task: "Task",
        plan: Plan,
        names: list[CellName],
        progress: Announce,
    ) -> dict[CellName, "Measured"]:
        from pytest_kvguard.engine import grid
        from pytest_kvguard.harness.measure import Bench
        from pytest_kvguard.policies import get_policy

        bench = self._benches.get(id(loaded))
        if bench is None:
            bench = self._benches[id(loaded)] = Bench(loaded, memory=self.settings.memory)
        policies = {str(name.policy): get_policy(name.policy) for name in names}
        cells = [grid.Cell(policies[str(name.policy)], name.ratio) for name in names]
        measured = bench.measure(
            task,
            cells,
            name=str(plan.task) if isinstance(plan.task, Spec) else task.name,
            limit=plan.limit,
            protocol=self.settings.protocol,
            protect=self.settings.protect,
            units=plan.units,
            progress=progress(f"{task.name}: {len(cells)} cells"),
        )
        if measured.given_up is not None:
            return dict.fromkeys(names, measured)
        return {
            name: replace(measured, runs=(run,))
            for name, run in zip(names, measured.runs, strict=True)
        }


def unregister(name: str) -> None:
    """Forget a policy or task that a hook added, when its session ends."""
    from pytest_kvguard.policies import POLICIES
    from pytest_kvguard.tasks import TASKS

    POLICIES.pop(name, None)
    TASKS.pop(name, None)


def _group(plan: Plan) -> tuple[str, int | None, str]:
    """Return what cells must share to be run together."""
    return _key(plan.task), plan.limit, plan.units


def _key(task: Any) -> str:
    return str(task) if isinstance(task, Spec) else f"{task.name} at {id(task)}"
