"""How far long work is: what the engine tells and a terminal shows."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """What a grid has done so far."""

    answers: int  # of the baseline and of every cell
    of: int  # answers in all
    cells: int  # cells that have all their answers
    tokens: int  # that went through the model


ProgressCallback = Callable[[Progress], None]
"""Is told after every pass of the model; it decides how often to say something."""


def no_progress(progress: Progress) -> None:
    """Do nothing."""
