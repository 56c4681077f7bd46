"""Modifiers that change how a policy's cache is stored."""

from collections.abc import Mapping
from typing import Any

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies.base import Modifier, Policy, Storage
from pytest_kvguard.policies.modify import modified


def storing(name: str, storage: Storage, params: Mapping[str, Any]) -> Modifier:
    """Return what stores a policy's cache in this way.

    The modifier raises InvalidArgument for a policy whose cache is stored in some way already.
    """

    def modify(policy: Policy) -> Policy:
        if policy.store is not None:
            raise InvalidArgument(f"{policy.name} says already how it is stored; leave out {name}")
        return modified(policy, name, params, store=storage)

    return modify
