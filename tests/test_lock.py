"""The lock fixes everything that is installed, on any machine, and lies within our own ranges."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCKS = ["constraints.txt", "constraints-oldest.txt"]


def lines(name: str) -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def locked(name: str) -> dict[str, Version]:
    """Return the version of each package in a lock."""
    requirements = [Requirement(line) for line in lines(name) if line and line[0] != "#"]
    return {
        canonicalize_name(r.name): Version(str(r.specifier).removeprefix("=="))
        for r in requirements
    }


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_versions_and_no_place_or_build(name):
    assert [line for line in lines(name) if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+|", line)] == []


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_is_made_with_the_oldest_python(name):
    made_with = re.search(r"with Python ([\d.]+)", "\n".join(lines(name)))[1]
    oldest = str(SpecifierSet(PROJECT["requires-python"])).removeprefix(">=")
    assert made_with == oldest


def test_the_lock_holds_what_is_asked_for_directly():
    versions = locked("constraints.txt")
    direct = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    for requirement in map(Requirement, direct):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_oldest_transformers_is_the_first_that_the_range_allows():
    [range_] = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "transformers"]
    assert Version(str(range_.specifier).removeprefix(">=")) == locked(LOCKS[1])["transformers"]


def test_the_commands_of_the_readme_install_what_is_locked():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^\$\(VENV\)/ready: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    installs = recipe.replace("\\\n", "").count("pip install ")
    assert installs == recipe.count("--constraint constraints.txt") > 0
