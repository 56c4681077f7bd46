"""Deprecations: red where our code calls what is deprecated, a line in the log elsewhere."""

import tomllib
from pathlib import Path

import pytest
import torch  # noqa: F401  # runs inside this process forget what they import first

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
PROJECT = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))

THEIRS = """
    import warnings

    import torch

    def renamed():
        warnings.warn("the old name is deprecated", FutureWarning, stacklevel=2)

    def removed():
        warnings.warn("this will go", DeprecationWarning)

    def calls_renamed():
        renamed()

    class Model(torch.nn.Module):
        def forward(self):
            warnings.warn("the old name is deprecated", FutureWarning, stacklevel=2)

    class Outer(torch.nn.Module):
        def forward(self):
            Model()()

    def doubtful():
        warnings.warn("are you sure?", UserWarning)
"""


@pytest.fixture
def run(pytester):
    """Run one line of a test of ours, which calls an installed package, with our own settings."""
    installed = pytester.mkdir("site-packages")
    pytester.makefile(".py", **{"site-packages/theirs": THEIRS})
    pytester.syspathinsert(installed)
    filters = PROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"]
    pytester.makeini("\n".join(["[pytest]", "filterwarnings =", *(f"  {x}" for x in filters)]))

    def run_line(line, *options, top="import theirs"):
        pytester.makepyfile(f"{top}\ndef test_it():\n    {line}")
        plugins = ("-p", "tests.deprecations", "-p", "no:kvguard")
        return pytester.runpytest(*plugins, *options)

    return run_line


@pytest.mark.parametrize("line", ["theirs.renamed()", "theirs.Model()()"])
def test_our_call_of_what_is_deprecated_is_red(run, line):
    result = run(line)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*FutureWarning: the old name is deprecated"])


def test_a_test_that_warns_is_red(run):
    line = 'warnings.warn("ours", PendingDeprecationWarning)'
    run(line, top="import warnings").assert_outcomes(failed=1)


def test_our_import_of_what_is_deprecated_is_red(run):
    run("pass", top="import theirs\ntheirs.renamed()").assert_outcomes(errors=1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("theirs.calls_renamed()", "the old name is deprecated"),
        ("theirs.Outer()()", "the old name is deprecated"),
        ("theirs.removed()", "this will go"),
    ],
)
def test_what_others_call_is_a_line_in_the_log(run, line, said):
    result = run(line)
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines([f"*Warning: {said}"])


def test_other_warnings_are_red_wherever_they_come_from(run):
    run("theirs.doubtful()").assert_outcomes(failed=1)


def test_what_the_command_line_says_of_warnings_holds(run):
    run("theirs.renamed()", "-W", "default").assert_outcomes(passed=1, warnings=1)
