"""The report file: all cells of a session as one JSON document. See docs/report.md."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from pytest_kvguard.report.record import Cell, as_json

SCHEMA = 1
"""Goes up when a field changes its meaning or goes away, not when one is added."""


def write_report(
    path: Path,
    model: str,
    versions: Mapping[str, str],
    cells: Iterable[Cell],
    *,
    complete: bool = True,
) -> None:
    """Write all cells of a session as one JSON file, whole or not at all.

    Makes the folders that are missing. ``complete`` is False while the session runs, and where
    it ended early. Raises OSError where the file cannot be written; the one before is left then.
    """
    document = {
        "schema": SCHEMA,
        "model": model,
        "versions": dict(versions),
        "complete": complete,
        "cells": list(cells),
    }
    text = json.dumps(as_json(document), indent=1, allow_nan=False)
    target = Path(os.path.realpath(path))  # what a link points to is written, the link stays
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".kvguard-report.{os.getpid()}")
    try:
        draft.write_text(text + "\n", encoding="utf-8")
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
