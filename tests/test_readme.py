"""What the documents show is run, and what they list is complete."""

import re
import shlex
import zipfile
from pathlib import Path

import pytest

from pytest_kvguard.options import OPTIONS
from pytest_kvguard.policies import POLICIES
from pytest_kvguard.tasks import TASKS
from tests.documents import blocks, section

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


FACTS = """
from pytest_kvguard import kv_sensitivity


@kv_sensitivity("facts", ratios=[0.5], limit=8)
def test_it_runs(kv_result):
    assert kv_result.verdict != "refused", kv_result.reason
"""

pytestmark = pytest.mark.usefixtures("imported")


def test_every_option_has_a_row():
    shown = re.findall(
        r"^\| `(--[a-z-]+) ([A-Z]+)`", section(README, "## Options"), flags=re.MULTILINE
    )
    assert shown == [(option.flag, option.metavar) for option in OPTIONS]


def named(heading: str) -> list[str]:
    """Return the names in the first column of the table under a heading."""
    first_cells = re.findall(r"^\| (`.*?) \|", section(README, f"## {heading}"), flags=re.MULTILINE)
    return re.findall(r"`(\w+)`", " ".join(first_cells))


def test_every_task_has_a_row():
    assert sorted(named("Tasks")) == sorted(TASKS)


def test_the_policies_shown_exist_and_are_put_together_as_shown(pytester):
    policies = section(README, "## Policies")
    assert set(named("Policies")) <= set(POLICIES)
    shown = [spec for item in policies.split("\n- ")[1:] for spec in specs(item)]
    assert len(shown) >= 4
    pytester.makepyfile(FACTS)
    arguments = [f"--kv-policy={spec}" for spec in shown]
    result = pytester.runpytest_inprocess(*arguments, "-p", "no:cacheprovider")
    result.assert_outcomes(passed=len(shown))


def specs(item: str) -> list[str]:
    """Return the specs an item of a list is about: in code, before a colon."""
    return re.findall(r"`([^`]+)`:", item)


COMMANDS = re.findall(r"^    (pytest suites/.*)$", README, flags=re.MULTILINE)


def test_the_command_at_the_top_is_the_demo():
    assert COMMANDS[0] in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, pytester, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command)[1:]
    result = pytester.runpytest_inprocess(
        *arguments, "--kv-limit=6", "-p", "no:cacheprovider", "-k", "facts or two_steps"
    )
    result.stdout.fnmatch_lines(["*KV-cache sensitivity of reasoner*", "*facts*shotkv*", "*%*"])


def test_the_wheel_holds_suites_model_and_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "suites/retrieval/test_retrieval.py",
        "reasoner/model.safetensors",
        "reasoner/tokenizer.json",
        "tasks/data/gsm8k_questions.jsonl",
    ):
        assert f"pytest_kvguard/{needed}" in names


def test_the_examples_of_the_readme_run(pytester):
    tests = [code for code in blocks(README, "python") if "def test_" in code]
    assert len(tests) == 1
    pytester.makepyfile(tests[0])
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert result.parseoutcomes().get("errors", 0) == 0
    assert result.parseoutcomes()["passed"] >= 2
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_model_of_ones_own_comes_from_the_fixture_shown(pytester):
    [conftest] = [code for code in blocks(README, "python") if "def kv_model" in code]
    loader = """
    def load_my_model():
        from pytest_kvguard.models import load
        loaded = load("reasoner")
        return loaded.model, loaded.tokenizer
    """
    pytester.makeconftest(conftest + "\n" + re.sub(r"^    ", "", loader, flags=re.MULTILINE))
    pytester.makepyfile("def test_mine(kv_model):\n    assert kv_model.name == 'mine'\n")
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/report.md",
        "docs/policies.md",
        "docs/formats.md",
        "docs/kvpress.md",
    ],
)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), target
