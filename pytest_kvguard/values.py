"""Read what users type: numbers, shares, sizes and words. An error says what was meant, if it can.

Every reader takes text and raises InvalidArgument for what it cannot use.
"""

import math
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches

from pytest_kvguard.errors import InvalidArgument

UNITS_OF_SIZE = {"": 1, "b": 1} | {
    f"{prefix}{infix}b": (1000 if infix == "" else 1024) ** power
    for power, prefix in enumerate("kmgt", start=1)
    for infix in ("", "i")
}
"""Bytes of each unit, in small letters: GB is 1000**3, GiB 1024**3, as in accelerate."""

LEAST_MEMORY = 2**20
"""Bytes of the float32 logits of one step of one row, for the largest vocabularies (256 k)."""


def keep_ratio(text: str) -> float:
    """Read a fraction kept, in (0, 1]."""
    value = number(text)
    if not 0 < value <= 1:
        way = "0.25 keeps a quarter of the prompt"
        if 1 < value <= 100 and value.is_integer():
            way = f"did you mean {value / 100:g}? it is a share, not a percentage"
        raise InvalidArgument(f"keep ratio must be in (0, 1], got {text!r}; {way}")
    return value


def max_drop(text: str) -> float:
    """Read the largest loss that is acceptable, in [0, 1)."""
    value = number(text)
    if not 0 <= value < 1:
        way = "0.1 allows a tenth"
        if 1 < value < 100 and value.is_integer():
            way = f"did you mean {value / 100:g}? it is a share, not a percentage"
        raise InvalidArgument(f"max drop must be in [0, 1), got {text!r}; {way}")
    return value


def number(text: str) -> float:
    """Read a number; nan and text are none."""
    try:
        value = float(text)
    except ValueError:
        raise InvalidArgument(f"expected a number, got {text!r}{_meant(text)}") from None
    if value != value:
        raise InvalidArgument(f"expected a number, got {text!r}")
    return value


def _meant(text: str) -> str:
    """Say how to write a number that was written in another way, or nothing."""
    if found := re.fullmatch(r"\s*(\d*),(\d+)\s*", text):
        return f"; write {found[1] or 0}.{found[2]}, with a decimal point"
    if found := re.fullmatch(r"\s*(\d+\.?\d*)\s*%\s*", text):
        return f"; write {float(found[1]) / 100:g}"
    if (found := re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)) and float(found[2]):
        return f"; write {float(found[1]) / float(found[2]):g}"
    if re.fullmatch(r"\s*\d*\.?\d+([\s,;]+\d*\.?\d+)+\s*", text):
        return "; several are separated by commas on the command line, and a list in Python"
    return ""


def decimal_comma(text: str) -> str:
    """Say that a comma separates values, if one seems to be a decimal comma: ``0,25``."""
    found = re.search(r"(?<![\w.])0,(\d+)(?![\w.])", text)
    return f"; did you mean 0.{found[1]}? a comma separates values" if found else ""


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise InvalidArgument(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def memory_size(text: str) -> int:
    """Read a number of bytes, at least LEAST_MEMORY: ``500MB``, ``4GiB`` or plain bytes."""
    found = re.fullmatch(r"([-+]?[\d.]+(?:e[-+]?\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in UNITS_OF_SIZE:
        unit = found[2] if found else ""
        way = f"write {found[1]}{unit.upper()}B or {found[1]}{unit.upper()}iB" if found else ""
        hint = f"; {way}" if f"{unit}b" in UNITS_OF_SIZE and unit else ""
        raise InvalidArgument(
            f"expected a size such as 500MB, 4GiB or a number of bytes, got {text!r}{hint}"
        )
    value = number(found[1]) * UNITS_OF_SIZE[found[2]]
    if not LEAST_MEMORY <= value < math.inf:
        way = "write a size such as 500MB or 4GiB"
        if not found[2] and 1 <= value <= 1024:
            way = f"a plain number counts bytes, did you mean {found[1]}GiB?"
        raise InvalidArgument(f"expected at least 1MiB ({LEAST_MEMORY} bytes), got {text!r}; {way}")
    return int(value)


def one_of(*known: str, meant: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Make a reader of one of several words; meant: what else they are called, for a hint."""

    def read(text: str) -> str:
        if text not in known:
            small = text.strip().lower()
            near = [(meant or {}).get(small, ""), *get_close_matches(small, known, n=1)]
            hint = next((f"; did you mean {word!r}?" for word in near if word), "")
            raise InvalidArgument(f"expected one of {', '.join(known)}, got {text!r}{hint}")
        return text

    return read


def device(text: str) -> str:
    """Read ``auto``, ``cpu``, ``cuda`` or ``cuda:1``; whether it is there is seen later."""
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text):
        return text
    hint = ""
    if found := re.fullmatch(r"(?:gpu|cuda|nvidia)?[:\s]?([0-9]{0,3})", text.strip().lower()):
        hint = f"; did you mean '{f'cuda:{found[1]}' if found[1] else 'cuda'}'?" if text else ""
    raise InvalidArgument(f"expected auto, cpu, cuda or cuda:N, got {text!r}{hint}")


def model_name(text: str) -> str:
    """Read the name of a model; whether there is such a model is seen later."""
    if not text.strip():
        raise InvalidArgument(f"expected the name of a model, got {text!r}")
    return text
