"""Hooks for other packages and conftest files: policies and tasks of their own.

A policy or task registered here can be named on the command line and in markers::

    # conftest.py
    def pytest_kvguard_policies():
        return {"newest": newest}  # keyword parameters -> pytest_kvguard.policies.base.Policy
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_kvguard.policies.base import Policy
    from pytest_kvguard.tasks.base import Task


@pytest.hookspec
def pytest_kvguard_policies() -> "Mapping[str, Callable[..., Policy]]":
    """Return policies by name: factories with keyword parameters, all with defaults.

    Called once, before the first marked test is read; a name that is taken is an error.
    """
    raise AssertionError("a hook specification is never called")


@pytest.hookspec
def pytest_kvguard_tasks() -> "Mapping[str, Callable[..., Task]]":
    """Return tasks by name: factories with keyword parameters, all with defaults."""
    raise AssertionError("a hook specification is never called")
