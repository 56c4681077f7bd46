"""The report file is tried before anything is measured, and kept however the run ends."""

import json
import os
import signal
from pathlib import Path

import pytest

from pytest_kvguard.options import report_file

GRID = """
    import os, signal, time
    import pytest
    from pytest_kvguard import kv_sensitivity

    @kv_sensitivity("recall", policies=["snapkv", "tova"], ratios=[0.9, 0.75], max_drop=0.5)
    def test_recall(kv_result):
        if kv_result.kept.policy == "tova":
            {end}
"""
ENDS = {
    "the first failure": ("assert False", ["-x"], 1),
    "as many failures as may be": ("assert False", ["--maxfail=1"], 1),
    "Ctrl-C": ("raise KeyboardInterrupt", [], 2),
    "a test that ends the run": ("pytest.exit('enough', returncode=7)", [], 7),
    "no summary": ("assert False", ["-x", "--no-summary"], 1),
    "no terminal": ("assert False", ["-x", "-p", "no:terminal"], 1),
}


def specs(report: dict) -> list[tuple[str, float]]:
    return [(cell["spec"], cell["ratio"]) for cell in report["cells"]]


BEFORE = [("snapkv", 0.9), ("snapkv", 0.75), ("tova", 0.9)]


@pytest.mark.parametrize(("end", "options", "code"), ENDS.values(), ids=list(ENDS))
def test_a_run_that_ends_early_leaves_what_it_measured(suite, end, options, code):
    suite.pytester.makepyfile(GRID.format(end=end))
    result = suite("--kv-report=kv.json", *options, no_reraise_ctrlc=True)
    assert result.ret == code
    assert specs(suite.report()) == BEFORE
    assert suite.report()["complete"] is False
    if not {"no:terminal", "returncode=7"} & {*options, end.rpartition(" ")[2].rstrip(")")}:
        result.stdout.fnmatch_lines(
            ["report written to kv.json, without what the run did not get to"]
        )


def test_a_run_that_comes_to_its_end_says_so_whatever_failed(suite):
    suite.pytester.makepyfile(GRID.format(end="assert False"))
    result = suite("--kv-report=kv.json")
    result.assert_outcomes(passed=2, failed=2)
    assert suite.report()["complete"] is True
    assert len(suite.report()["cells"]) == 4
    result.stdout.fnmatch_lines(["report written to kv.json"])


def test_the_job_summary_says_that_a_run_ended_early(suite, monkeypatch):
    page = suite.pytester.path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    suite.pytester.makepyfile(GRID.format(end="assert False"))
    suite("-x", "--no-summary")
    assert "** The run ended early: cells may be missing." in page.read_text(encoding="utf-8")
    page.unlink()
    suite()
    assert "ended early" not in page.read_text(encoding="utf-8")


def test_so_does_a_process_that_is_killed_wherever_it_is_by_then(suite):
    suite.pytester.mkdir("elsewhere")
    suite.pytester.makepyfile(
        GRID.format(end="os.chdir('elsewhere'); os.kill(os.getpid(), signal.SIGKILL)")
    )
    ran = suite.pytester.runpytest_subprocess(f"--kv-model={suite.model}", "--kv-report=kv.json")
    assert ran.ret == -signal.SIGKILL
    assert specs(suite.report()) == BEFORE
    assert suite.report()["complete"] is False
    assert not list(suite.pytester.path.glob(".kvguard*"))


@pytest.mark.parametrize(
    ("end", "complete"),
    [("assert False", False), ("os.kill(os.getpid(), signal.SIGKILL)", True)],
    ids=["the first failure", "a crash"],  # xdist fails the test that crashed and goes on
)
def test_so_does_a_run_on_workers(suite, end, complete):
    suite.pytester.makepyfile(GRID.format(end=end))
    result = suite("--kv-report=kv.json", "-n1", *["-x"] * (not complete))
    assert result.ret in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
    assert set(BEFORE) <= set(specs(suite.report()))
    assert suite.report()["complete"] is complete
    result.stdout.fnmatch_lines(["report written to kv.json*"])


def test_a_folder_that_is_missing_is_made_once_there_is_something_to_write(suite):
    suite.pytester.makepyfile(GRID.format(end="pass"))
    suite("--kv-report=new/folder/kv.json", "--collect-only")
    assert not (suite.pytester.path / "new").exists()
    suite("--kv-report=new/folder/kv.json").assert_outcomes(passed=4)
    report = json.loads((suite.pytester.path / "new/folder/kv.json").read_text("utf-8"))
    assert len(report["cells"]) == 4


def test_a_report_that_cannot_be_written_in_the_end_fails_the_run_in_one_line(suite, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pytest_kvguard.report.summary.write_report", full)
    suite.pytester.makepyfile(GRID.format(end="pass"))
    result = suite("--kv-report=kv.json")
    result.assert_outcomes(passed=4)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["cannot write the report kv.json: *No space left on device"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_ends_the_run_before_anything_is_measured(suite):
    suite.pytester.makepyfile(GRID.format(end="pass"))
    folder = suite.pytester.mkdir("shut")
    folder.chmod(0o555)
    result = suite("--kv-report=shut/new/kv.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --kv-report: cannot write *: Permission denied; *"])


def test_trying_leaves_nothing_behind_and_touches_no_old_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("kv.json").write_text("old")
    os.utime("kv.json", (1, 1))
    for name in ("kv.json", "other.json", "new/kv.json"):
        assert report_file(name) == Path(name)
    assert list(tmp_path.iterdir()) == [tmp_path / "kv.json"]
    assert Path("kv.json").read_text() == "old"
    assert Path("kv.json").stat().st_mtime == 1
