"""Modifiers that change how a policy's cache is stored."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies.base import Modifier, Policy
from pytest_kvguard.policies.modify import modified
from pytest_kvguard.storage.base import Storage


def storing(name: str, format: Callable[..., Storage]) -> Callable[..., Modifier]:
    """Turn a storage format into a modifier: what stores a policy's cache in this way.

    It raises InvalidArgument for a policy whose cache is stored in some way already.
    """

    @wraps(format)
    def modifier(**params: Any) -> Modifier:
        storage = format(**params)

        def modify(policy: Policy) -> Policy:
            if policy.store is not None:
                raise InvalidArgument(
                    f"{policy.name} says already how it is stored; leave out {name}"
                )
            return modified(policy, name, storage.params, store=storage)

        return modify

    return modifier
