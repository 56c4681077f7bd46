"""The model under test: found, loaded with its tokenizer, placed on one device or several."""

from pytest_kvguard.models.artefacts import cache_dir
from pytest_kvguard.models.finding import REASONER, Checkpoint, check, find, reasoner
from pytest_kvguard.models.loading import Loaded, load, wrap
from pytest_kvguard.models.placement import DTYPES, check_device
from pytest_kvguard.models.smollm2 import SMOLLM2, smollm2

__all__ = [
    "DTYPES",
    "REASONER",
    "SMOLLM2",
    "Checkpoint",
    "Loaded",
    "cache_dir",
    "check",
    "check_device",
    "find",
    "load",
    "reasoner",
    "smollm2",
    "wrap",
]
