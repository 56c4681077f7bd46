"""What turns one policy into another: how its cache is stored, what else must stay."""

from collections.abc import Callable

from pytest_kvguard.policies.base import Modifier

MODIFIERS: dict[str, Callable[..., Modifier]] = {}
"""Every modifier by name. One that stands alone in a spec modifies `full`."""
