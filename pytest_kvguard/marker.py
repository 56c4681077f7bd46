"""The marker ``kv_sensitivity``: a task, policies and ratios, and how much may be lost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

from pytest_kvguard.errors import InvalidArgument, UnknownName
from pytest_kvguard.options import (
    DEFAULT_MAX_DROP,
    DEFAULT_POLICIES,
    DEFAULT_RATIOS,
    DEFAULT_UNITS,
    Settings,
    unit_kind,
)
from pytest_kvguard.specs import Spec, parse, parse_call
from pytest_kvguard.values import count, keep_ratio, max_drop

NAME = "kv_sensitivity"
SIGNATURE = (
    "kv_sensitivity(task, *, policies=None, ratios=None, max_drop=None, limit=None, units=None): "
    "run a task with the full KV cache and under each policy at each keep ratio, one test item each"
)
Value = TypeVar("Value")
KEYWORDS = ("policies", "ratios", "max_drop", "limit", "units")


def kv_sensitivity(
    task: Any,
    *,
    policies: str | Sequence[str] | None = None,
    ratios: float | Sequence[float] | None = None,
    max_drop: float | None = None,
    limit: int | None = None,
    units: str | None = None,
) -> pytest.MarkDecorator:
    """Mark a test that asks for ``kv_result``: one item for each policy and ratio.

    task: a name such as ``"retrieval"`` or ``"retrieval(length=800)"``, or a Task. policies,
    ratios, max_drop, limit and units are what the command line may override.
    """
    given = {
        "policies": policies,
        "ratios": ratios,
        "max_drop": max_drop,
        "limit": limit,
        "units": units,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    decorator: pytest.MarkDecorator = getattr(pytest.mark, NAME)
    return decorator.with_args(task, **chosen)


@dataclass(frozen=True)
class Plan:
    """What one marked test measures."""

    task: Any  # a Spec, or a Task
    policies: tuple[Spec, ...]
    ratios: tuple[float, ...]
    max_drop: float
    limit: int | None
    units: str  # what a policy that keeps units keeps whole


def plan(mark: pytest.Mark, settings: Settings) -> Plan:
    """Read a marker; what the command line says wins.

    Raises InvalidArgument or UnknownName for arguments that cannot be used.
    """
    for name in mark.kwargs:
        if name not in KEYWORDS:
            raise UnknownName(f"argument of {NAME}", name, KEYWORDS)
    if len(mark.args) != 1:
        raise InvalidArgument(f"{NAME} takes one task, got {len(mark.args)} arguments")
    asked = {name: value for name, value in mark.kwargs.items() if value is not None}
    own_policies = _each(parse_policy, "policies", asked.get("policies", DEFAULT_POLICIES))
    own_ratios = _each(_from_text(keep_ratio), "ratios", asked.get("ratios", DEFAULT_RATIOS))
    own_drop = _named(_from_text(max_drop), "max_drop", asked.get("max_drop", DEFAULT_MAX_DROP))
    own_limit = _named(_from_text(count), "limit", asked["limit"]) if "limit" in asked else None
    own_units = _named(_from_text(unit_kind), "units", asked.get("units", DEFAULT_UNITS))
    return Plan(
        task=_task(mark.args[0], settings),
        policies=settings.policies or own_policies,
        ratios=settings.ratios or own_ratios,
        max_drop=own_drop if settings.max_drop is None else settings.max_drop,
        limit=own_limit if settings.limit is None else settings.limit,
        units=settings.units or own_units,
    )


def _task(given: Any, settings: Settings) -> Any:
    if not isinstance(given, str):
        return given
    own = parse_call(given)
    override = settings.tasks.get(own.name, own)
    return Spec(own.name, {**own.params, **override.params})


def parse_policy(given: Any) -> Spec:
    """Read a policy as it is typed. Raises InvalidArgument for anything but text."""
    if not isinstance(given, str):
        name = getattr(given, "name", "snapkv")
        raise InvalidArgument(
            f"a policy is named as text, such as {name!r}, got a {type(given).__name__}; "
            f"register_policy gives a policy of your own a name"
        )
    return parse(given)


def _from_text(read: Callable[[str], Value]) -> Callable[[Any], Value]:
    return lambda given: read(str(given))


def _each(read: Callable[[Any], Value], name: str, given: Any) -> tuple[Value, ...]:
    """Read one value or several, each once."""
    listed = given if isinstance(given, list | tuple) else [given]
    values = tuple(dict.fromkeys(_named(read, name, value) for value in listed))
    if not values:
        raise InvalidArgument(f"{NAME} was given no {name}, so it would measure nothing")
    return values


def _named(read: Callable[[Any], Value], name: str, given: Any) -> Value:
    """Read the value of an argument, and say which it was if that fails."""
    try:
        return read(given)
    except InvalidArgument as problem:
        raise InvalidArgument(f"{name}: {problem}") from None
