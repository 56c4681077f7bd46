"""Policies of other packages: by entry point, or behind the name of a source and a colon."""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from pytest_kvguard.errors import InvalidArgument, Unavailable, UnknownName
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.policies.kvpress import from_kvpress
from pytest_kvguard.specs import Spec, make

GROUP = "pytest_kvguard.policies"
"""The entry points to look among: the name of a policy -> its factory."""

POLICY_SOURCES: dict[str, Callable[[Spec], Policy]] = {"kvpress": from_kvpress}
"""What stands before the colon -> makes a policy of the name behind it and its parameters."""


def from_source(spec: Spec) -> Policy:
    """Make ``source:name(key=value)``. Raises UnknownName for a source nobody knows."""
    source, _, name = spec.name.partition(":")
    if source not in POLICY_SOURCES:
        raise UnknownName("source of policies", source, POLICY_SOURCES)
    return POLICY_SOURCES[source](Spec(name, spec.params))


def entry_point_names() -> list[str]:
    """Return the names other packages give to policies of theirs."""
    return sorted({found.name for found in entry_points(group=GROUP)})


def from_entry_point(spec: Spec) -> Policy:
    """Make a policy of another package, imported now; its name must be one of theirs.

    Raises Unavailable for a package that cannot be imported, and InvalidArgument for what is no
    factory, makes something else than a Policy, or bears a name that two packages give.
    """
    found, *others = (each for each in entry_points(group=GROUP) if each.name == spec.name)
    if others:
        raise InvalidArgument(
            f"{_whose(found)} and {_whose(others[0])} have one name; uninstall one of the packages"
        )
    try:
        factory = found.load()
    except Exception as problem:  # other people's code
        raise Unavailable(
            f"{_whose(found)} cannot be imported: {type(problem).__name__}: {problem}; "
            f"install what it needs"
        ) from problem
    policy = make("policy", spec, {spec.name: factory}) if callable(factory) else factory
    if not isinstance(policy, Policy):
        raise InvalidArgument(f"{_whose(found)} must be a factory of a Policy, got {policy!r}")
    return policy


def _whose(found: EntryPoint) -> str:
    package = f" of {found.dist.name}" if found.dist else ""
    return f"the policy {found.name!r}{package}, {found.value},"
