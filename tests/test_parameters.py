"""What is typed in parentheses behind a policy, a modifier or a task, tried with every wrong kind.

No value that cannot be meant is taken, and none ends in anything but an error that names it.
"""

import inspect
import math

import pytest

from pytest_kvguard.errors import KVGuardError
from pytest_kvguard.policies import POLICIES
from pytest_kvguard.policies.modifiers import MODIFIERS
from pytest_kvguard.tasks import TASKS

NEVER = [math.nan, math.inf, -math.inf, -1.5, [], {}, (1,), "no-such-thing"]
"""What no parameter may be."""

ODD = [0, -1, 2.5, True, "", " ", None, 10**9]
"""What some parameter may be."""

PARAMETERS = [
    pytest.param(factory, name, id=f"{kind}-{owner}-{name}")
    for kind, factories in (("policy", POLICIES), ("modifier", MODIFIERS), ("task", TASKS))
    for owner, factory in sorted(factories.items())
    for name in inspect.signature(factory).parameters
]


def attempt(factory, name: str, value: object) -> str | None:
    """Return what the factory says against a value; anything but an error of ours goes through."""
    try:
        factory(**{name: value})
    except KVGuardError as problem:
        return str(problem)
    return None


@pytest.mark.parametrize(("factory", "name"), PARAMETERS)
def test_what_no_parameter_may_be_is_named(factory, name):
    for value in NEVER:
        said = attempt(factory, name, value)
        assert said is not None, f"{name}={value!r} was taken"
        assert str(value) in said
        assert len(said) < 400


@pytest.mark.parametrize(("factory", "name"), PARAMETERS)
def test_what_a_parameter_may_not_be_is_refused_in_one_sentence(factory, name):
    default = inspect.signature(factory).parameters[name].default
    taken = [value for value in ODD if attempt(factory, name, value) is None]
    if isinstance(default, int) and not isinstance(default, bool):
        assert all(type(value) is int for value in taken), taken
    assert len(taken) < len(ODD)
