"""The recipes of CONTRIBUTING.md work as written."""

import re
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from pytest_kvguard import check_policy, policies
from pytest_kvguard.laws import LAWS
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.policies.selectors import top_tokens
from tests.documents import blocks, section

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def package(pytester, monkeypatch, imported):
    """The files the recipe shows, each under the name in its first line."""
    files: dict[str, str] = {}
    for code in blocks(TEXT, "python"):
        name = re.match(r"# (\w+)\.py", code)[1]
        files[name] = files.get(name, "") + code
    for name, code in files.items():
        (pytester.path / f"{name}.py").write_text(code, encoding="utf-8")
    pytester.syspathinsert()
    monkeypatch.setattr(policies, "POLICIES", dict(policies.POLICIES))
    yield
    sys.modules.pop("newest", None)


def test_the_policies_of_the_recipe_run_as_shown(package, pytester):
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-v")
    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines(["*it_loses_little*rolling-0.5* PASSED*"])


def test_a_package_offers_its_policy_by_the_entry_point_shown(package, pytester):
    [shown] = blocks(TEXT, "toml")
    [(group, policies)] = tomllib.loads(shown)["project"]["entry-points"].items()
    about = pytester.mkdir("newest-1.dist-info")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in policies.items())]
    (about / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    (about / "METADATA").write_text("Name: newest\nVersion: 1\n", encoding="utf-8")
    assert get_policy("newest").name == "newest"


def test_a_broken_law_reports_as_shown(package):
    from newest import newest

    greedy = newest()

    def one_too_many(importance, n, state):
        return top_tokens(importance, n + 1, state)

    with pytest.raises(AssertionError) as caught:
        check_policy(
            Policy("newest", greedy.importance, greedy.budget, one_too_many), max_examples=20
        )
    shown = section(TEXT, "### When a law is broken").split("```")[1].split("\n")[1:3]
    assert [str(caught.value), caught.value.__notes__[0].split("\n")[0]] == shown


def test_every_law_is_explained():
    rows = re.findall(r"^\| (.*?) \|", section(TEXT, "### When a law is broken"), re.MULTILINE)
    assert [row for row in rows if row != "law"] == list(LAWS)


def test_everything_a_policy_can_declare_is_listed():
    declared = re.findall(r"`(\w+)=", section(TEXT, "### What to declare"))
    contract = ("name", "importance", "budget", "select", "params")
    known = {field.name for field in fields(Policy)} - set(contract)
    assert set(declared) == known
