"""Where a model is: a name of ours, a folder, a GGUF file, or a hub id. Nothing is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_kvguard.errors import InvalidArgument, Unavailable
from pytest_kvguard.hub import ask_hub
from pytest_kvguard.models.smollm2 import SMOLLM2, smollm2, smollm2_gguf

REASONER = "reasoner"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """Where transformers finds a model, and what it must be told besides."""

    place: str  # a folder or hub id
    extra: Mapping[str, Any] = field(default_factory=dict)


def check(name: str) -> None:
    """Raise what `find` does, but leave what takes long to `find`."""
    if name == SMOLLM2:
        smollm2_gguf()
    else:
        find(name)


def find(name: str) -> Checkpoint:
    """Say where a model is, fetching and converting what must be.

    Raises InvalidArgument for a path that holds no model, and Unavailable for what would have to
    be downloaded and cannot be.
    """
    if not name.strip():
        raise InvalidArgument(f"a model needs a name, got {name!r}; leave it out for {REASONER!r}")
    if name == REASONER:
        return Checkpoint(str(reasoner()))
    if name == SMOLLM2:
        return Checkpoint(str(smollm2()))
    path = _expanded(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InvalidArgument(f"there is no GGUF file at {name!r}")
        return Checkpoint(str(path.parent), {"gguf_file": path.name})
    if path.is_dir():
        _check_folder(name, path)
        return Checkpoint(str(path))
    if path.is_file():
        raise InvalidArgument(f"{name!r} is a file; give the folder it lies in, or a .gguf file")
    if path.is_absolute() or name.startswith("."):
        raise InvalidArgument(f"there is no model folder at {name!r}")
    offline = ask_hub(name, (REASONER, SMOLLM2))
    return Checkpoint(name, {"local_files_only": True} if offline else {})


def reasoner() -> Path:
    """Return the folder of the model that ships with this package; its README is its card."""
    package = Path(__file__).parents[1]
    for folder in (package / REASONER, package.parent / "fixtures" / REASONER):
        if (folder / "config.json").is_file():
            return folder
    raise Unavailable(
        f"the model {REASONER!r} is missing from this installation; reinstall pytest-kvguard, or "
        f"pass --kv-model=FOLDER"
    )


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~ of a user nobody knows
        raise InvalidArgument(f"there is no home folder for {name!r}") from None


def _check_folder(name: str, path: Path) -> None:
    if not (path / "config.json").is_file():
        raise InvalidArgument(f"the folder {name!r} holds no config.json, so it is no model")
    if not any(any(path.glob(pattern)) for pattern in WEIGHTS):
        raise InvalidArgument(
            f"the folder {name!r} holds a config.json but no weights ({', '.join(WEIGHTS[::2])})"
        )
