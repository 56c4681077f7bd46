import json
import math
import os
import stat
from pathlib import Path

import pytest

from pytest_kvguard.report.document import write_report
from tests.documents import documented_fields


def read(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_the_documentation_lists_exactly_the_fields_of_the_document(tmp_path):
    write_report(tmp_path / "kv.json", "tiny", {}, [])
    assert documented_fields("The document") == list(read(tmp_path / "kv.json"))


@pytest.mark.parametrize("complete", [True, False])
def test_a_report_reads_back_as_it_was_written(tmp_path, cells, complete):
    write_report(tmp_path / "kv.json", "tiny", {"torch": "2.13"}, iter(cells), complete=complete)
    assert read(tmp_path / "kv.json") == {
        "schema": 1,
        "model": "tiny",
        "versions": {"torch": "2.13"},
        "complete": complete,
        "cells": cells,
    }


def test_nothing_in_a_report_is_beyond_json(tmp_path, cells):
    odd = cells[0] | {"params": {"sinks": (4, math.inf), "where": Path("a")}, "dp": math.nan}
    write_report(tmp_path / "kv.json", "tiny", {}, [odd])
    (cell,) = read(tmp_path / "kv.json")["cells"]
    assert cell["params"] == {"sinks": [4, None], "where": "a"}
    assert cell["dp"] is None


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, cells, monkeypatch):
    path = tmp_path / "kv.json"
    path.write_text("old")

    def full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(path, "tiny", {}, cells)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_that_are_missing_are_made(tmp_path, cells):
    write_report(tmp_path / "a" / "b" / "kv.json", "tiny", {}, cells)
    assert read(tmp_path / "a" / "b" / "kv.json")["cells"] == cells


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path, cells):
    (tmp_path / "archive").mkdir()
    link = tmp_path / "kv.json"
    link.symlink_to("archive/first.json")
    write_report(link, "tiny", {}, cells)
    assert link.is_symlink()
    assert read(tmp_path / "archive" / "first.json")["cells"] == cells


def test_a_name_of_any_length_and_script_is_written_and_readable_by_whom_the_user_lets(tmp_path):
    path = tmp_path / ("ж" * 120 + ".json")  # 245 of 255 bytes
    before = os.umask(0o022)
    try:
        write_report(path, "tiny", {}, [])
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]
