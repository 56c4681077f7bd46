import pytest

from pytest_kvguard.report import progress

GRID = """
    from pytest_kvguard import kv_sensitivity

    @kv_sensitivity("recall", policies=["snapkv", "tova"], ratios=[0.9, 0.25], max_drop=0.5)
    def test_recall(kv_result):
        assert kv_result.holds, kv_result.reason
"""
ONE = """
    from pytest_kvguard import kv_sensitivity

    @kv_sensitivity("recall{task}", policies="snapkv", ratios={ratio}, max_drop={limit})
    def test_recall(kv_result):
        assert kv_result.holds, kv_result.reason
"""
TOTAL = {"schema", "model", "versions", "complete", "cells"}


def one(task: str = "", ratio: float = 0.9, limit: float = 0.5) -> str:
    return ONE.format(task=task, ratio=ratio, limit=limit)


def test_the_summary_and_the_report_show_every_cell_alone_and_on_two_workers(suite, monkeypatch):
    suite.pytester.makepyfile(test_it=GRID, test_other="def test_nothing_of_ours(): pass")
    alone, report = suite("--kv-report=kv.json"), suite.report()
    monkeypatch.setattr(progress, "EVERY", progress.EVERY)  # the conftest changes it for this run
    with (suite.pytester.path / "conftest.py").open("a", encoding="utf-8") as conftest:
        conftest.write("\nimport pytest_kvguard.report.progress as p; p.EVERY = 0\n")
    spread, again = suite("--kv-report=kv.json", "-n2", "--kv-memory=1MiB"), suite.report()
    spread.stdout.no_fnmatch_line("*answers*")
    for result in (alone, spread):
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.assert_outcomes(passed=3, failed=2)
        result.stdout.fnmatch_lines(
            [
                f"*= KV-cache sensitivity of {suite.model} =*",
                "task*policy*ratio*held*n*base*kept*dP*interval*-/+*verdict",
                "recall*snapkv*0.9*89%*24*1.000*pass",
                "recall*snapkv*0.25*23%*24*1.000*FAIL",
                "recall*tova*0.9*89%*24*1.000*pass",
                "recall snapkv@0.25*: FAIL: dP * lies below the limit -50.0%: * broke, 0 mended",
                "2 pass, 2 FAIL",
                "report written to kv.json",
            ]
        )
    assert report.keys() == TOTAL
    assert (report["schema"], report["model"]) == (1, str(suite.model))
    assert report["versions"].keys() >= {"python", "pytest-kvguard", "torch", "transformers"}
    assert [timeless(cell) for cell in report["cells"]] == [timeless(c) for c in again["cells"]]
    assert [(cell["policy"], cell["ratio"]) for cell in report["cells"]] == [
        ("snapkv", 0.9),
        ("snapkv", 0.25),
        ("tova", 0.9),
        ("tova", 0.25),
    ]


def timeless(cell: dict) -> dict:
    """Leave out what depends on the machine, the memory it was given, and rounding."""
    return {k: v for k, v in cell.items() if k not in {"seconds", "counts", "fidelity"}}


def test_what_is_reported_is_what_was_held(suite):
    share = 8 / 35  # of the tokens of each prompt
    suite.pytester.makepyfile(one(ratio=share))
    (cell,) = suite.cells()
    assert cell["verdict"] != "refused"  # as it would be if more were held than asked for
    assert cell["held"] == {"min": share, "mean": pytest.approx(share, abs=1e-12), "max": share}
    assert cell["bytes_full"] == 24 * 34 * 3 * 2 * 2 * 12 * 4  # samples, tokens, K and V of floats
    assert cell["bytes_held"] * 34 == cell["bytes_full"] * 7  # the last token is fed again
    assert cell["base"] == 1.0
    assert cell["dp"] == pytest.approx(cell["kept"] - 1)
    assert len(cell["broke"]) == round(24 * (1 - cell["kept"]))
    assert cell["fidelity"]["kl"] > 0


def test_a_storage_that_fails_on_its_first_sample_is_refused_and_reported(suite):
    suite.pytester.makepyfile(one().replace('"snapkv"', '"kivi(group=8, residual=8)"'))
    result = suite("--kv-report=kv.json")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["recall*kivi*0.9*?*24*refused", "*cannot be cut into groups of 8*"]
    )
    (cell,) = suite.report()["cells"]
    assert (cell["verdict"], cell["bytes_full"], cell["held"]) == ("refused", 0, None)


def test_a_model_too_weak_for_a_task_skips_it_and_is_listed_as_refused(suite):
    suite.pytester.makepyfile(one("(right=0)"))
    result = suite("-rs", "--kv-report=kv.json")
    assert result.ret == 0
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(
        ["SKIPPED [[]1[]] *: the model is too weak for this task: * it gets 0 of 15 answers *"]
    )
    (cell,) = suite.report()["cells"]
    assert cell["verdict"] == "refused"
    assert "too weak for this task" in cell["reason"]
    assert "24 samples show a loss only from 20.8% up" in cell["reason"]
    assert "of its 15 answers, 15 were truncated" in cell["reason"]
    assert (cell["n"], cell["base"], cell["kept"]) == (15, 0.0, None)
    assert cell["endings"] == {"ended": 0, "truncated": 15, "looped": 0}


def test_a_few_right_answers_are_too_few_to_lose_any(suite):
    suite.pytester.makepyfile(one("(right=0.15)"))
    suite("--kv-report=kv.json").assert_outcomes(skipped=1)
    (cell,) = suite.report()["cells"]
    assert cell["verdict"] == "refused"
    assert cell["kept"] is not None


def test_a_ratio_of_one_changes_nothing_and_is_refused_as_a_gate(suite):
    suite.pytester.makepyfile(one(ratio=1.0))
    result = suite("--kv-report=kv.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*nothing was evicted, so passing would prove nothing*"])
    (cell,) = suite.report()["cells"]
    assert (cell["dp"], cell["kept"], cell["broke"]) == (0, 1.0, [])
    assert cell["verdict"] == "refused"
    assert cell["bytes_held"] == cell["bytes_full"]


FAULTY = """
    from dataclasses import replace

    from pytest_kvguard import get_policy
    from recall import recall

    def greedy(): # keeps all, whatever is asked
        policy = get_policy("tova")
        return replace(policy, name="greedy", select=lambda importance, n, state: importance > -1)

    def broken():
        def importance(state):
            raise ZeroDivisionError("my own mistake")
        return replace(get_policy("tova"), name="broken", importance=importance)

    def pytest_kvguard_policies():
        return {"greedy": greedy, "broken": broken}

    def pytest_kvguard_tasks():
        return {"recall": recall}
"""


def test_a_faulty_policy_fails_its_own_cells_with_its_own_message(suite):
    suite.pytester.makeconftest(FAULTY)
    suite.pytester.makepyfile(one(limit=0.5))
    result = suite("--kv-policy=broken,tova,greedy", "--kv-report=kv.json")
    result.assert_outcomes(passed=1, failed=2)
    broken, tova, greedy = suite.report()["cells"]
    assert (broken["verdict"], tova["verdict"], greedy["verdict"]) == ("refused", "pass", "refused")
    assert "sample q0: ZeroDivisionError: my own mistake" in broken["reason"]
    assert "policy 'greedy', layer 0: kept 35 positions, the budget is 31" in greedy["reason"]


@pytest.mark.parametrize(("mode", "holds"), [("gate", 1), ("proved", 0), ("regression", 1)])
def test_the_mode_decides_what_an_inconclusive_cell_is_worth(suite, mode, holds):
    suite.pytester.makepyfile(one(ratio=0.9, limit=0.15))
    result = suite(f"--kv-mode={mode}", "--kv-report=kv.json")
    result.assert_outcomes(passed=holds, failed=1 - holds)
    (cell,) = suite.report()["cells"]
    assert cell["verdict"] == "inconclusive"
    assert cell["max_drop"] == 0.15


def test_a_loss_past_the_limit_is_let_through_only_by_a_limit_that_allows_it(suite):
    suite.pytester.makepyfile(one(ratio=0.9, limit=0.01))
    suite().assert_outcomes(failed=1)
    suite("--kv-mode=regression").assert_outcomes(failed=1)
    suite("--kv-max-drop=0.5").assert_outcomes(passed=1)


def test_a_failing_assertion_says_what_was_lost(suite):
    suite.pytester.makepyfile(
        """
        from pytest_kvguard import kv_sensitivity

        @kv_sensitivity("recall", ratios=0.25)
        def test_recall(kv_result):
            assert kv_result.dp >= -0.1
        """
    )
    suite().stdout.fnmatch_lines(
        ["E * where -0.* = <recall snapkv(*)@0.25: 1.000 -> 0.*, dP -*% [[]*], * broke, *"]
    )


def test_a_ci_job_gets_its_summary_appended(suite, monkeypatch):
    suite.pytester.makepyfile(one())
    page = suite.pytester.path / "summary.md"
    page.write_text("# Before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    suite()
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Before\n### KV-cache compression: ")
    assert "**1 pass**" in text
    assert "| recall | snapkv | 0.9 | 89% | 24 | 1.000 |" in text


def test_a_job_summary_that_cannot_be_written_takes_nothing_else_away(suite, monkeypatch):
    suite.pytester.makepyfile(one())
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "no/folder/summary.md")
    result = suite("--kv-report=kv.json")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["1 pass", "report written to kv.json", "cannot append to the job summary: *No such file*"]
    )


def test_junit_files_hold_each_measurement_as_a_property(suite):
    suite.pytester.makepyfile(one())
    suite("--junitxml=junit.xml")
    text = (suite.pytester.path / "junit.xml").read_text(encoding="utf-8")
    assert text.count('<property name="kvguard" value="{&quot;model&quot;: ') == 1
    assert "&quot;verdict&quot;: &quot;pass&quot;" in text


def test_a_report_that_was_asked_for_and_is_not_written_is_spoken_of(suite):
    suite.pytester.makepyfile("def test_nothing_of_ours(): pass")
    result = suite("--kv-report=kv.json")
    result.stdout.fnmatch_lines(["nothing was measured, so no report is written to kv.json"])
    assert not (suite.pytester.path / "kv.json").exists()
