"""A model over several devices. Without GPUs: the CPU, and a disk that layers are fetched from."""

import pytest
from accelerate import dispatch_model

from pytest_kvguard.engine.grid import Cell
from pytest_kvguard.harness.measure import Bench
from pytest_kvguard.models import wrap
from pytest_kvguard.policies import get_policy
from pytest_kvguard.tasks.base import Part, Sample, Task
from tests import tiny
from tests.plugin import stand_in


@pytest.fixture(scope="module")
def task() -> Task:
    texts = [" ".join(f"w{i}" for i in tiny.tokens(30, seed=s) if i > 3) for s in range(4)]
    samples = [Sample(f"s{i}", (Part("question", text),), ("x",)) for i, text in enumerate(texts)]
    return Task("t", "t", tuple(samples), lambda completion, _: float("w" in completion), 4)


def measure(model, task: Task) -> list[dict]:
    loaded = wrap(model, stand_in.tokenizer(), name="tiny")
    cells = [Cell(get_policy(name), 0.5) for name in ("snapkv", "h2o")]
    measured = Bench(loaded).measure(task, cells)
    runs = [measured.baseline, *measured.runs]
    assert [run.error for run in runs] == [None] * 3
    return [run.answers for run in runs]


def test_a_model_over_several_devices_answers_as_on_one(task, tmp_path):
    places = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "cpu",
        "model.norm": "cpu",
        "lm_head": "disk",
    }
    spread = dispatch_model(tiny.llama(), places, main_device="cpu", offload_dir=tmp_path)
    held = {weights.device.type for weights in spread.parameters()}
    assert held == {"cpu", "meta"}  # what lies on the disk has no values until it is called
    assert measure(spread, task) == measure(tiny.llama(), task)
