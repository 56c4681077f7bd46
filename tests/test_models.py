from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pytest_kvguard import models
from pytest_kvguard.errors import InvalidArgument, Unavailable
from pytest_kvguard.models import placement
from tests import tiny
from tests.plugin import stand_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.llama().save_pretrained(path)
    stand_in.tokenizer().save_pretrained(path)
    return path


def test_a_folder_is_loaded_ready_to_run(folder):
    loaded = models.load(str(folder), device="cpu", dtype="auto")
    assert loaded.name == str(folder)
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    for name, weights in tiny.llama().state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], weights)
    assert loaded.decode([1, 5, 6, 2]) == "w5 w6"


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_weights_have_the_type_that_was_asked_for(folder, name):
    loaded = models.load(str(folder), device="cpu", dtype=name)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, name)}


def test_a_gpu_is_used_when_there_is_one_and_nothing_else_was_asked_for(folder):
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert models.load(str(folder)).model.device.type == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            {"dtype": "int8"},
            "dtype must be one of auto, float32, bfloat16, float16, got 'int8'",
        ),
        ({"device": "gpu"}, "device must be auto, cpu or cuda[:n], got 'gpu'"),
        ({"device": "cuda:1"}, "device 'cuda:1' was asked for, but torch sees no GPU; use cpu"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(folder, monkeypatch, asked, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidArgument) as caught:
        models.load(str(folder), **asked)
    assert str(caught.value) == expected


def test_a_gpu_beyond_the_last_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert models.check_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InvalidArgument) as caught:
        models.check_device("cuda:2")
    assert str(caught.value) == (
        "device 'cuda:2' was asked for, but torch sees 2 GPUs; the last is cuda:1"
    )


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", "auto"),
        ("auto", "cuda:1", "auto"),
        ("float16", "cpu", torch.float16),
        ("bfloat16", "cuda", torch.bfloat16),
    ],
)
def test_the_type_is_the_checkpoints_on_a_gpu_and_float32_on_a_cpu(name, device, expected):
    assert placement.choose_dtype(name, torch.device(device)) == expected


def test_a_path_that_holds_no_model_is_named(tmp_path):
    (tmp_path / "file.txt").write_text("", encoding="utf-8")
    for name, why in [
        (f"{tmp_path}/none", "there is no model folder at "),
        (f"{tmp_path}/none.gguf", "there is no GGUF file at "),
        ("~/no-such-file.gguf", "there is no GGUF file at "),
        ("~nobody-of-that-name/model", "there is no home folder for "),
        (f"{tmp_path}/file.txt", "is a file; give the folder it lies in, or a .gguf file"),
        (f"{tmp_path}", "holds no config.json, so it is no model"),
        (" ", "a model needs a name, got "),
    ]:
        with pytest.raises(InvalidArgument) as caught:
            models.load(name)
        assert why in str(caught.value)
        assert repr(name) in str(caught.value)


def test_a_folder_without_weights_is_named(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(InvalidArgument, match=r"holds a config.json but no weights \(\*.safetenso"):
        models.load(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("no weights", encoding="utf-8")
    with pytest.raises(Unavailable, match="give a hub id that is reachable, a folder with conf"):
        models.load(str(tmp_path))


@pytest.mark.parametrize(
    ("generation", "tokenizer", "expected"),
    [(2, 2, {2}), ([2, 1], 0, {0, 1, 2}), (None, 2, {2}), (1, None, {1}), (None, None, set())],
)
def test_an_answer_ends_at_every_token_that_model_or_tokenizer_end_at(
    generation, tokenizer, expected
):
    model, words = tiny.llama(), stand_in.tokenizer()
    model.generation_config.eos_token_id = generation
    words.eos_token = None if tokenizer is None else words.convert_ids_to_tokens(tokenizer)
    assert models.wrap(model, words, name="mine").eos == expected


def test_a_model_of_ones_own_keeps_its_name_and_stops_training():
    model = tiny.llama().train()
    loaded = models.wrap(model, stand_in.tokenizer(), name="mine")
    assert loaded.name == "mine"
    assert loaded.model is model
    assert not model.training


WEIGHTS = sum(p.numel() * 4 for p in tiny.llama().parameters())


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs, as far as one can tell without using them; bytes free on each."""
    free = [2 * WEIGHTS, 2 * WEIGHTS]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu], free[gpu]))
    return free


def place(folder: Path, *, device: str = "cuda", room: int = 0, dtype: object = torch.float32):
    return placement.spread(str(folder), {}, torch.device(device), dtype, room)


def test_a_model_goes_over_all_gpus_when_one_cannot_hold_it_beside_its_caches(folder, two_gpus):
    assert place(folder) is None
    assert place(folder, room=WEIGHTS // 2) is None
    tight = WEIGHTS + WEIGHTS // 8
    budget = {0: 2 * WEIGHTS - tight, 1: 2 * WEIGHTS - tight}
    expected = {"device_map": "auto", "max_memory": budget}
    assert place(folder, room=tight) == expected
    assert place(folder, room=tight, dtype="auto") == expected  # the checkpoint's is float32
    assert place(folder, room=tight, dtype=torch.float16) is None
    for device in ("cuda:1", "cpu"):
        assert place(folder, room=tight, device=device) is None
    two_gpus.pop()
    assert place(folder, room=tight) is None


def test_a_model_that_all_gpus_cannot_hold_is_refused_with_the_sizes(folder, two_gpus):
    with pytest.raises(
        Unavailable, match=r"the weights take .* GiB, but the 2 GPUs have .* GiB fo"
    ):
        place(folder, room=2 * WEIGHTS - 1)


def test_a_model_that_is_spread_is_not_moved_again(folder, two_gpus, monkeypatch):
    """What transformers is told is read here; on the way every tensor stays on the CPU."""
    real, told = AutoModelForCausalLM.from_pretrained, {}

    def from_pretrained(place: str, **settings: object):
        told.update(settings)
        model = real(place, dtype=torch.float32)
        monkeypatch.setattr(model, "to", lambda *_: pytest.fail("it was moved"))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    models.load(str(folder), device="auto", room=WEIGHTS + WEIGHTS // 8)
    assert told["device_map"] == "auto"
    assert told["dtype"] == "auto"
    assert set(told["max_memory"]) == {0, 1}  # and no CPU or disk to leave weights on
