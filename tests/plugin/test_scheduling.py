"""How items are spread over xdist's workers."""

from types import SimpleNamespace

import pytest

from pytest_kvguard import options, plugin
from pytest_kvguard.scheduling import CellScheduling


def config(dist: str, given: str | None = None):
    """Stand in for a run that names one option of ours, or none."""
    values = {option.ini: None for option in options.OPTIONS} | {"dist": dist, "kv_policy": given}
    return SimpleNamespace(
        getoption=values.get,
        getini=lambda name: None,
        getvalue=lambda name: ["popen", "popen"],
    )


def test_the_cells_of_a_test_go_to_one_worker_and_other_tests_wherever_there_is_room():
    split = CellScheduling._split_scope
    assert split(None, "a/test_it.py::test_one[tova-0.5]") == "a/test_it.py::test_one"
    assert split(None, "a/test_it.py::test_one[h2o+tova@[x]-0.25]") == "a/test_it.py::test_one"
    assert split(None, "a/test_it.py::test_two") == "a/test_it.py::test_two"


@pytest.mark.parametrize(
    ("dist", "given", "ours"),
    [("load", "tova", True), ("load", None, False), ("loadfile", "tova", False)],
)
def test_only_runs_that_ask_for_us_and_for_no_other_order_are_spread_by_us(dist, given, ours):
    made = plugin.pytest_xdist_make_scheduler(config(dist, given), None)
    assert isinstance(made, CellScheduling) is ours
