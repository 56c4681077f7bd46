from types import SimpleNamespace

import pytest

from pytest_kvguard.progress import Progress
from pytest_kvguard.report.progress import describe, reporter

SLOW = """
    from pytest_kvguard import kv_sensitivity

    @kv_sensitivity("recall", ratios=[0.5, 0.25])
    def test_recall(kv_result):
        print("captured")
"""


@pytest.mark.parametrize("capture", ["fd", "no"])
def test_long_work_says_how_far_it_is(suite, monkeypatch, capture):
    monkeypatch.setattr("pytest_kvguard.report.progress.EVERY", 0)
    suite.pytester.makepyfile(SLOW)
    result = suite("--kv-memory=1MiB", f"--capture={capture}")  # a few prompts at a time
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        ["recall: 2 cells: * of 72 answers, * cells done, * tokens a second, * s left"]
    )


def test_short_work_says_nothing(suite):
    suite.pytester.makepyfile(SLOW)
    result = suite("--kv-memory=1MiB")
    result.assert_outcomes(passed=2)
    result.stdout.no_fnmatch_line("*answers*")


def test_nothing_is_said_where_there_is_no_terminal(suite, monkeypatch):
    monkeypatch.setattr("pytest_kvguard.report.progress.EVERY", 0)
    suite.pytester.makepyfile(SLOW)
    result = suite("--kv-memory=1MiB", "-p", "no:terminal")
    assert result.ret == 0
    assert result.stdout.str() == ""


def test_the_rest_is_foretold_from_the_answers_so_far():
    said = describe(Progress(answers=120, of=600, cells=1, tokens=31_260), 6.0)
    assert said == "120 of 600 answers, 1 cell done, 5,210 tokens a second, 24 s left"


def test_before_the_first_answer_nothing_is_foretold():
    said = describe(Progress(answers=0, of=600, cells=0, tokens=900), 3.0)
    assert said == "0 of 600 answers, 0 cells done, 300 tokens a second"


def test_a_line_comes_when_ten_seconds_have_gone_by_since_the_last(monkeypatch):
    clock, lines = [0.0], []
    monkeypatch.setattr("pytest_kvguard.report.progress.monotonic", lambda: clock[0])
    plugins = {"terminalreporter": SimpleNamespace(write_line=lines.append)}
    hear = reporter(SimpleNamespace(pluginmanager=SimpleNamespace(get_plugin=plugins.get)))("work")
    told = []
    for clock[0] in (0.5, 9.9, 10.0, 10.5, 19.9, 20.0, 31.0):
        before = len(lines)
        hear(Progress(answers=1, of=3, cells=0, tokens=5))
        told += [clock[0]] * (len(lines) - before)
    assert told == [10.0, 20.0, 31.0]
    clock[0] = 60.0
    hear(Progress(answers=3, of=3, cells=1, tokens=9))  # what is done needs no line
    assert len(lines) == 3
