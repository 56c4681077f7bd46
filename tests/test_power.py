"""The instrument has power: on the shipped model it passes what is sound and fails what is not."""

import pytest

from pytest_kvguard.engine.grid import Cell
from pytest_kvguard.harness.compare import Comparison
from pytest_kvguard.harness.measure import Bench, Measured
from pytest_kvguard.models import load
from pytest_kvguard.policies import get_policy
from pytest_kvguard.tasks import get_task


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(load("reasoner"))


def measured(bench: Bench, task: str, *cells: tuple[str, float]) -> Measured:
    return bench.measure(get_task(task), [Cell(get_policy(name), ratio) for name, ratio in cells])


def comparisons(found: Measured) -> list[Comparison]:
    return [Comparison(found.baseline, run, max_drop=0.10) for run in found.runs]


def test_retrieval_passes_under_snapkv_and_fails_under_random_tokens(bench):
    found = measured(bench, "retrieval_facts", ("snapkv", 0.5), ("random_tokens", 0.1))
    assert found.baseline.mean >= 0.95
    sound, broken = comparisons(found)
    assert sound.verdict == "pass", sound.reason
    assert broken.verdict == "fail", broken.reason


def test_reasoning_fails_under_random_tokens_and_keeping_all_changes_nothing(bench):
    found = measured(bench, "word_problems", ("random_tokens", 0.25), ("snapkv", 1.0))
    broken, same = comparisons(found)
    assert broken.verdict == "fail", broken.reason
    assert same.observed == 0
    assert same.verdict == "refused"
    assert found.runs[1].answers == found.baseline.answers


def test_shots_are_held_within_the_ratio_in_every_layer_and_head(bench):
    found = measured(bench, "word_problems", ("shotkv", 0.25))
    [run] = found.runs
    assert 0 < run.held.max <= 0.25
    assert run.bytes_held <= 0.25 * run.bytes_full


def test_a_grid_prefills_each_prompt_once(bench):
    one = measured(bench, "facts", ("shotkv", 0.5))
    grid = [
        (name, ratio) for name in ("shotkv", "snapkv", "random_tokens") for ratio in (0.5, 0.25)
    ]
    many = measured(bench, "facts", *grid)
    prefills = {run.counts.prefills for run in (one.baseline, *one.runs, many.baseline, *many.runs)}
    assert len(prefills) == 1
