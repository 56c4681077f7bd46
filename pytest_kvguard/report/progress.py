"""Progress of long work, while pytest captures everything else."""

from collections.abc import Callable
from time import monotonic

import pytest

from pytest_kvguard.progress import Progress, ProgressCallback

EVERY = 10.0  # seconds between two lines; work shorter than that says nothing


def reporter(config: pytest.Config) -> Callable[[str], ProgressCallback]:
    """Return what turns a title into a listener that writes a line now and then.

    Workers of a distributed run have no terminal and stay silent.
    """
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")

    def start(title: str) -> ProgressCallback:
        began = told = monotonic()

        def hear(progress: Progress) -> None:
            nonlocal told
            now = monotonic()
            if terminal is None or progress.answers >= progress.of or now - told < EVERY:
                return
            told = now
            text = f"{title}: {describe(progress, now - began)}"
            if capture is None:
                terminal.write_line(text)
                return
            with capture.global_and_fixture_disabled():
                terminal.ensure_newline()
                terminal.write_line(text)

        return hear

    return start


def describe(progress: Progress, seconds: float) -> str:
    """Say how far work is: ``120 of 600 answers, 1 cell done, 5,210 tokens a second, 24 s left``.

    What is left is told once there is an answer to judge by.
    """
    cells = f"{progress.cells} cell{'' if progress.cells == 1 else 's'} done"
    text = f"{progress.answers} of {progress.of} answers, {cells}, "
    text += f"{progress.tokens / seconds:,.0f} tokens a second"
    if progress.answers:
        left = (progress.of - progress.answers) * seconds / progress.answers
        text += f", {left:.0f} s left"
    return text
