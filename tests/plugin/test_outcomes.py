"""Whatever a measurement comes to, a whole run shows it as it is. The model is never asked."""

import json
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pytest_kvguard.session import Session
from tests.outcomes import MODES, outcomes

EACH = """
    import pytest

    @pytest.fixture(scope="session")
    def kv_model(): return None

    @pytest.mark.parametrize("number", range({number}))
    def test_it(kvguard, number):
        found = kvguard("recall", policy="tova", ratio=0.5)
        assert found.holds, found.reason
"""
drawn = st.sampled_from(MODES).flatmap(
    lambda mode: st.tuples(st.just(mode), st.lists(outcomes([mode]), min_size=1, max_size=6))
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=drawn)
def test_every_outcome_goes_through_a_whole_run(suite, monkeypatch, drawn):
    mode, found = drawn
    left = iter(found)
    monkeypatch.setattr(Session, "measure", lambda *_: next(left))
    page = suite.pytester.path / "summary.md"
    page.write_text("", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    suite.pytester.makepyfile(EACH.format(number=len(found)))

    result = suite(f"--kv-mode={mode}", "--kv-report=kv.json", "--junitxml=junit.xml", "-rA")
    ends = [end(outcome, mode) for outcome in found]
    tally = {f"{name}": ends.count(name) for name in ("passed", "failed", "skipped")}
    result.assert_outcomes(**tally)
    assert result.ret == ("failed" in ends)
    for word in ("INTERNALERROR", "Traceback"):
        result.stdout.no_fnmatch_line(f"*{word}*")

    cells = [outcome.cell for outcome in found]
    assert suite.report()["cells"] == cells
    cases = list(ElementTree.parse(suite.pytester.path / "junit.xml").iter("testcase"))
    for case, cell in zip(cases, cells, strict=True):
        (noted,) = case.iter("property")
        assert json.loads(noted.attrib["value"]) == cell
    page_tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))
    rows = sum(token.type == "tr_open" for token in page_tokens)
    assert rows == len(cells) + len({cell["model"] for cell in cells})  # a header for each model


def end(outcome, mode: str) -> str:
    """How the test ends that asks for an outcome and asserts that it holds."""
    if outcome.weakness is not None:
        return "failed" if mode == "proved" else "skipped"
    return "passed" if outcome.comparison.holds else "failed"


@pytest.mark.parametrize(
    ("task", "limit", "reason"),
    [
        ("recall(right=0)", 6, "it gets 0 of 2 answers right"),  # that proves it
        ("recall(right=0.1)", 24, "the baseline scores 0"),
    ],
)
def test_a_baseline_too_weak_is_a_skip_in_every_size(suite, task, limit, reason):
    suite.pytester.makepyfile(
        f"""
        from pytest_kvguard import kv_sensitivity

        @kv_sensitivity("{task}")
        def test_recall(kv_result):
            assert kv_result.holds
        """
    )
    result = suite("-rs", f"--kv-limit={limit}", "--kv-report=kv.json")
    result.assert_outcomes(skipped=1)
    (cell,) = suite.report()["cells"]
    assert (cell["verdict"], cell["skipped"]) == ("refused", True)
    assert 0 < cell["n"] <= limit  # it is given up when that is proved
    assert (cell["dp"] is None) == (cell["base"] == 0)
    assert reason in cell["reason"]
    result = suite("--kv-mode=proved", f"--kv-limit={limit}", "--kv-report=kv.json")
    result.assert_outcomes(errors=1)  # in the fixture
    (cell,) = suite.report()["cells"]
    assert (cell["verdict"], cell["skipped"]) == ("refused", False)
