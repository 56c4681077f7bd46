"""How what stays in a cache is encoded: formats by name."""

from collections.abc import Callable

from pytest_kvguard.storage.base import Storage
from pytest_kvguard.storage.fp8 import fp8
from pytest_kvguard.storage.int8 import int8
from pytest_kvguard.storage.kivi import kivi

FORMATS: dict[str, Callable[..., Storage]] = {"fp8": fp8, "int8": int8, "kivi": kivi}
"""Every storage format by name: a factory of keyword parameters."""
