"""What this package makes and keeps, each under a key of everything that made it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from pytest_kvguard.errors import Unavailable

MANIFEST = "made-by.json"
"""In every artefact: what its key was made of, to be read by people too."""


def cache_dir() -> Path:
    """Where artefacts are kept: KVGUARD_CACHE, or the user's cache folder."""
    if own := os.environ.get("KVGUARD_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pytest-kvguard"


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package, for a key."""
    return {package: version(package) for package in packages}


def digest(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep(name: str, made_by: Mapping[str, str], make: Callable[[Path], None]) -> Path:
    """Return the folder of an artefact, made now unless the very same is there already.

    made_by: everything that decides what is in it: sources, code, versions of whatever writes it.
    An artefact made by anything else is left alone, and this one made beside it. make: writes into
    an empty folder; what it raises goes through, and nothing is kept then.

    Of several processes that ask at once, one makes it and the others wait. Raises Unavailable
    for a cache folder that cannot be written.
    """
    text = json.dumps(made_by, indent=1, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = cache_dir() / f"{name}-{key}"
    if _made(folder, text):
        return folder
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_dir() / f"{name}-{key}.lock")
        lock.acquire()
    except OSError as problem:
        raise Unavailable(
            f"the cache folder {cache_dir()} cannot be written ({problem}); "
            f"set KVGUARD_CACHE to a folder that can"
        ) from problem
    try:
        if not _made(folder, text):
            _make(folder, text, make)
    finally:
        lock.release()
    return folder


def _made(folder: Path, text: str) -> bool:
    try:
        return (folder / MANIFEST).read_text(encoding="utf-8") == text
    except OSError:
        return False


def _make(folder: Path, text: str, make: Callable[[Path], None]) -> None:
    """Make an artefact aside and move it in place as a whole, its manifest with it."""
    with TemporaryDirectory(dir=folder.parent) as own:
        aside = Path(own) / folder.name
        aside.mkdir()
        make(aside)
        (aside / MANIFEST).write_text(text, encoding="utf-8")
        if not _made(folder, text):  # where locks do not work, another process may be first
            shutil.rmtree(folder, ignore_errors=True)  # whatever it is, it was not made whole
        try:
            aside.rename(folder)
        except OSError:
            if not _made(folder, text):
                raise
