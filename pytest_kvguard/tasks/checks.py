"""Checks of the parameters of tasks."""

from pytest_kvguard.errors import InvalidArgument


def check_count(name: str, value: int, low: int, high: int) -> None:
    """Raise InvalidArgument unless the value is a whole number from low to high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidArgument(f"{name} must be a whole number, {low} to {high}, got {value!r}")


def check_seed(value: int) -> None:
    """Raise InvalidArgument unless the value is a whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgument(f"seed must be a whole number, got {value!r}")
