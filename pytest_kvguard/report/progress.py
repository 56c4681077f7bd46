"""Progress of long work, while pytest captures everything else."""

from collections.abc import Callable
from time import monotonic

import pytest

EVERY = 10.0  # seconds between two lines; work shorter than that says nothing

Hear = Callable[[int, int], None]
"""Answers done, answers in all."""


def reporter(config: pytest.Config) -> Callable[[str], Hear]:
    """Return what turns a title into a listener that writes a line now and then.

    Workers of a distributed run have no terminal and stay silent.
    """
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")

    def start(title: str) -> Hear:
        began = told = monotonic()

        def hear(done: int, total: int) -> None:
            nonlocal told
            now = monotonic()
            if terminal is None or done >= total or now - told < EVERY:
                return
            told = now
            text = f"{title}: {describe(done, total, now - began)}"
            if capture is None:
                terminal.write_line(text)
                return
            with capture.global_and_fixture_disabled():
                terminal.ensure_newline()
                terminal.write_line(text)

        return hear

    return start


def describe(done: int, total: int, seconds: float) -> str:
    """Say how far work is: ``120 of 600 answers, 20.0 a second, 24 s left``."""
    rate = done / seconds
    return f"{done} of {total} answers, {rate:.1f} a second, {(total - done) / rate:.0f} s left"
