"""The tasks this package ships, by name. Importing it reads no data and loads no model library."""

from collections.abc import Callable
from typing import Any

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.specs import Spec, make, parse_call
from pytest_kvguard.tasks.arithmetic import arithmetic
from pytest_kvguard.tasks.base import Task
from pytest_kvguard.tasks.long_generation import long_generation
from pytest_kvguard.tasks.procedural import PROCEDURAL
from pytest_kvguard.tasks.retrieval import retrieval
from pytest_kvguard.tasks.world_knowledge import world_knowledge

TaskFactory = Callable[..., Task]
"""Keyword parameters, all with defaults -> a task."""

TASKS: dict[str, TaskFactory] = {
    "arithmetic": arithmetic,
    "long_generation": long_generation,
    "retrieval": retrieval,
    "world_knowledge": world_knowledge,
    **PROCEDURAL,
}


def get_task(spec: Spec | str, **overrides: Any) -> Task:
    """Make a task from ``name`` or ``name(key=value, ...)``; the overrides win.

    Raises UnknownName for a name or a parameter nobody knows, and what the factory raises.
    """
    spec = parse_call(spec) if isinstance(spec, str) else spec
    return make("task", Spec(spec.name, {**spec.params, **overrides}), TASKS)


def register_task(name: str, factory: TaskFactory) -> None:
    """Add a task under a name that is still free, or again under its own.

    Raises InvalidArgument for a name that cannot be typed in a spec, or is taken.
    """
    if not name.isidentifier():
        raise InvalidArgument(f"a task's name must be an identifier, got {name!r}")
    if TASKS.setdefault(name, factory) is not factory:
        raise InvalidArgument(f"task {name!r} is already registered; choose another name")
