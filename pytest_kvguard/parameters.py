"""What the factories of policies accept, each with an error that says what would do."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

from pytest_kvguard.errors import InvalidArgument


def check_count(name: str, value: int, least: int = 1) -> int:
    """Return a whole number of at least ``least``; raise InvalidArgument for anything else."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InvalidArgument(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def check_odd(name: str, value: int) -> int:
    """Return an odd number of at least 1; raise InvalidArgument for anything else."""
    if check_count(name, value) % 2 == 0:
        raise InvalidArgument(f"{name} must be odd, to have a middle; got {value!r}")
    return int(value)


def check_share(name: str, value: float) -> float:
    """Return a number in [0, 1]; raise InvalidArgument for anything else."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
        raise InvalidArgument(f"{name} must be in [0, 1], got {value!r}")
    return float(value)


def check_positive(name: str, value: float) -> float:
    """Return a finite number above 0; raise InvalidArgument for anything else."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise InvalidArgument(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def check_flag(name: str, value: bool) -> bool:
    """Return True or False; raise InvalidArgument for anything else."""
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} must be True or False, got {value!r}")
    return value


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return one of ``choices``; raise InvalidArgument for anything else."""
    if value not in choices:
        raise InvalidArgument(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return value


def frozen(**params: Any) -> Mapping[str, Any]:
    """Return the parameters a policy was made with, read-only."""
    return MappingProxyType(params)
