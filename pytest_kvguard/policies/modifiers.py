"""What turns one policy into another: how its cache is stored, what else must stay."""

from collections.abc import Callable

from pytest_kvguard.policies.base import Modifier
from pytest_kvguard.policies.fair import fair
from pytest_kvguard.policies.fp8 import fp8
from pytest_kvguard.policies.int8 import int8
from pytest_kvguard.policies.kivi import kivi
from pytest_kvguard.policies.neighbours import rerotated, reuse
from pytest_kvguard.policies.required import boundary, whitelist

MODIFIERS: dict[str, Callable[..., Modifier]] = {
    "boundary": boundary,
    "fair": fair,
    "fp8": fp8,
    "int8": int8,
    "kivi": kivi,
    "rerotated": rerotated,
    "reuse": reuse,
    "whitelist": whitelist,
}
"""Every modifier by name. One that stands alone in a spec modifies `full`."""
