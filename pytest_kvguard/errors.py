"""Everything this package raises on purpose."""

from collections.abc import Iterable
from difflib import get_close_matches


class KVGuardError(Exception):
    """Base class: catch this to catch everything."""


class InvalidArgument(KVGuardError, ValueError):
    """A value given by the user cannot be used."""


class UnknownName(KVGuardError, LookupError):
    """No policy, task, model or parameter is known under that name."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown {kind} {name!r}; {hint}known: {', '.join(known) or 'none'}")


class Unsupported(KVGuardError):
    """A model has layers or attention settings that cannot be compressed faithfully."""


class Unavailable(KVGuardError):
    """Something must be downloaded or installed first; the message says how."""


class Refused(KVGuardError):
    """A measurement that would prove nothing, or could only be had by breaking its contract."""
