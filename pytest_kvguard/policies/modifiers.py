"""What turns one policy into another: how its cache is stored, what else must stay."""

from collections.abc import Callable

from pytest_kvguard.policies.base import Modifier
from pytest_kvguard.policies.fair import fair
from pytest_kvguard.policies.neighbours import rerotated, reuse
from pytest_kvguard.policies.required import boundary, whitelist
from pytest_kvguard.policies.storing import storing
from pytest_kvguard.storage import FORMATS

_SELECTING: dict[str, Callable[..., Modifier]] = {
    "boundary": boundary,
    "fair": fair,
    "rerotated": rerotated,
    "reuse": reuse,
    "whitelist": whitelist,
}
_STORING = {name: storing(name, format) for name, format in FORMATS.items()}

MODIFIERS: dict[str, Callable[..., Modifier]] = dict(sorted({**_SELECTING, **_STORING}.items()))
"""Every modifier by name. One that stands alone in a spec modifies `full`."""
