"""A deprecation is an error where our code calls what is deprecated, elsewhere a line in the log.

pyproject.toml turns warnings into errors, but for deprecations: who should stop calling what is
deprecated cannot be told by a filter. A model's forward is called by torch, so a warning of its
arguments names torch, whoever called the model. Here the stack is looked at.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

PASS_ON = (
    "accelerate.hooks",
    "contextlib",
    "functools",
    "torch.nn.modules.module",
    "torch.utils._contextlib",
    "transformers.modeling_layers",
    "transformers.utils",
)
"""Modules that call what others call through them: decorators, and what Module.__call__ runs."""


@pytest.hookimpl(wrapper=True, trylast=True)  # inside pytest's own block for warnings
def pytest_collection(session):
    with ours_raised(session.config):
        return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item):
    with ours_raised(item.config):
        return (yield)


@contextmanager
def ours_raised(config: pytest.Config) -> Iterator[None]:
    """Raise deprecations that our code is to blame for; -W on the command line goes first."""
    shown = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None):
        if issubclass(category, DEPRECATIONS) and ours(config.rootpath, caller(filename, lineno)):
            raise message
        shown(message, category, filename, lineno, file, line)

    if not config.getoption("pythonwarnings"):
        warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def caller(filename: str, lineno: int) -> str:
    """Return the file that makes the call which is warned of at this line."""
    frame: FrameType | None = sys._getframe(1)
    while frame and (frame.f_code.co_filename, frame.f_lineno) != (filename, lineno):
        frame = frame.f_back
    while frame and f"{frame.f_globals.get('__name__')}.".startswith(
        tuple(f"{name}." for name in PASS_ON)
    ):
        frame = frame.f_back
    return frame.f_code.co_filename if frame else filename


def ours(root: Path, filename: str) -> bool:
    """Whether a file belongs to this repository and is not installed in an environment in it."""
    path = Path(filename)
    installed = path.is_relative_to(sys.prefix) or "site-packages" in path.parts
    return path.is_relative_to(root) and not installed
