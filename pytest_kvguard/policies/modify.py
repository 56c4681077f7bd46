"""How a modifier names what it makes of a policy."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.parameters import frozen
from pytest_kvguard.policies.base import Policy

SELECTING = {"importance", "budget", "select", "stays", "reuse"}
"""What a policy that is other people's code is not asked for."""


def modified(policy: Policy, name: str, params: Mapping[str, Any], **changes: Any) -> Policy:
    """Return the policy with fields changed, as ``policy|name``, and its parameters with more.

    On the full cache the modifier stands alone. Raises InvalidArgument for one applied twice, for
    a parameter that the policy has too, and for a modifier that would go unheard because other
    people's code selects, or because everything is held.
    """
    if name in policy.name.split("|")[1:]:
        raise InvalidArgument(f"{policy.name} is modified by {name} already; leave one out")
    if policy.foreign is not None and (changes.keys() & SELECTING):
        raise InvalidArgument(
            f"{policy.name} selects by code of its own, which {name} cannot change; "
            f"use {name} with a policy of this package"
        )
    if policy.saves == "reads" and (changes.keys() & SELECTING):
        raise InvalidArgument(
            f"{policy.name} holds everything, so {name} has nothing to keep; "
            f"use {name} with a policy that evicts"
        )
    if twice := sorted(policy.params.keys() & params.keys()):
        raise InvalidArgument(
            f"{policy.name} and {name} both have a parameter {twice[0]!r}; rename the policy's"
        )
    return replace(
        policy,
        name=name if policy.name == "full" else f"{policy.name}|{name}",
        params=frozen(**policy.params, **params),
        **changes,
    )
