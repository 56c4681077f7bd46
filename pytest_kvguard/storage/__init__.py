"""How what stays in a cache is encoded: formats by name."""

from collections.abc import Callable

from pytest_kvguard.storage.base import Storage
from pytest_kvguard.storage.fp4 import mxfp4, nvfp4
from pytest_kvguard.storage.fp8 import fp8
from pytest_kvguard.storage.ggml import GGML
from pytest_kvguard.storage.int8 import int8
from pytest_kvguard.storage.kivi import kivi
from pytest_kvguard.storage.turboquant import TURBOQUANT
from pytest_kvguard.storage.vllm_fp8 import fp8_e4m3, fp8_e5m2

FORMATS: dict[str, Callable[..., Storage]] = {
    "fp8": fp8,
    "fp8_e4m3": fp8_e4m3,
    "fp8_e5m2": fp8_e5m2,
    "int8": int8,
    "kivi": kivi,
    **GGML,
    **TURBOQUANT,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
}
"""Every storage format by name: a factory of keyword parameters."""
