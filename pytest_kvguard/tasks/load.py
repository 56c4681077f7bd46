"""Rows of a data set: vendored, from a user's file, or from the hub. A fault names its place."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pytest_kvguard.errors import InvalidArgument, Unavailable

Fields = Mapping[str, tuple[type, ...]]
"""The fields every row must have, and the types their values may be of."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Row:
    """One JSON object, and where it stands."""

    place: str  # "my.jsonl, line 3"
    values: Mapping[str, Any]

    def wrong(self, field: str, why: str) -> InvalidArgument:
        """Return the error for a value that cannot be used."""
        return InvalidArgument(f"{self.place}: field {field!r} {why}")


@dataclass(frozen=True)
class HubSet:
    """Which part of a hub data set to read."""

    config: str
    split: str


def load(data: str | Path, fields: Fields, part: HubSet) -> list[Row]:
    """Read a file of JSON lines (``.gz`` too), or else a hub data set named ``owner/name``."""
    if not isinstance(data, str | Path) or not str(data).strip():
        raise InvalidArgument(f"data must be a file of JSON lines, or owner/name, got {data!r}")
    path = Path(data)
    if path.is_file():
        return load_file(path, fields)
    if _HUB_ID.fullmatch(str(data)) and not re.search(r"\.(jsonl?|gz)$", path.name):
        return load_hub(str(data), fields, part)
    raise InvalidArgument(f"no file {str(data)!r}; give a file of JSON lines, or owner/name")


def unique_ids(rows: Sequence[Row], prefix: str) -> list[str]:
    """Return the ``id`` of each row; where a row has none, the prefix and its number.

    Raises InvalidArgument for an id that comes twice.
    """
    ids = [str(row.values.get("id", f"{prefix}-{at:05d}")) for at, row in enumerate(rows)]
    times = Counter(ids)
    for row, name in zip(rows, ids, strict=True):
        if times[name] > 1:
            raise row.wrong("id", f"must be unique, and {name!r} comes {times[name]} times")
    return ids


def load_vendored(name: str, fields: Fields) -> list[Row]:
    """Read a data file that is part of this package."""
    text = (files("pytest_kvguard.tasks") / "data" / name).read_text(encoding="utf-8")
    return _checked(name, _parsed(name, text), fields)


def load_file(path: Path, fields: Fields) -> list[Row]:
    """Read a file with one JSON object a line; blank lines are skipped.

    Raises InvalidArgument, with the file, the line and the field, for what cannot be used.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"cannot read {path}: {error}") from error
    return _checked(str(path), _parsed(str(path), text), fields)


def load_hub(name: str, fields: Fields, part: HubSet) -> list[Row]:
    """Read a hub data set with the ``datasets`` library, which downloads and caches it.

    Raises Unavailable when it cannot be had.
    """
    import datasets

    from pytest_kvguard.hub import read_data_set  # it costs start-up time

    try:
        with read_data_set(name):
            table = datasets.load_dataset(name, part.config, split=part.split)
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"cannot load {name!r} ({part.config}, {part.split}) from the hub: {error}; "
            f"connect and run once to fill the cache, give a file of JSON lines as data=, "
            f"or leave data= out for the samples that come with this package"
        ) from error
    rows = (Row(f"{name}, row {i}", dict(row)) for i, row in enumerate(table))
    return _checked(name, rows, fields)


def _parsed(name: str, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidArgument(f"{place} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise InvalidArgument(f"{place} must be a JSON object, got {line[:60]}")
        yield Row(place, values)


def _checked(name: str, rows: Iterator[Row], fields: Fields) -> list[Row]:
    checked = []
    for row in rows:
        for field, types in fields.items():
            if field not in row.values:
                known = ", ".join(row.values) or "none"
                raise row.wrong(field, f"is missing; the fields there are: {known}")
            value = row.values[field]
            if not isinstance(value, types) or isinstance(value, bool):
                wanted = " or ".join(t.__name__ for t in types)
                raise row.wrong(field, f"must be {wanted}, got {value!r}")
        checked.append(row)
    if not checked:
        raise InvalidArgument(f"{name} holds no rows; it needs one JSON object a line")
    return checked
