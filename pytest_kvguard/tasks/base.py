"""What a task is: samples made of parts, a scorer, and how the answer is asked for. Text only."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["system", "instruction", "shot", "document", "question"]
"""What a part is for. ``system`` comes first if at all; the last part is a ``question``.

The parts before the first ``question`` are the *context*: what can be compressed ahead.
"""

Protocol = Literal["prompt", "context"]
"""When compression happens: after the whole prompt, or after its context, before the question."""


@dataclass(frozen=True)
class Part:
    """A stretch of a prompt. Parts are written one after the other with nothing between."""

    kind: Kind
    text: str
    unit: str | None = None  # parts with the same unit live or die together


@dataclass(frozen=True)
class Sample:
    """One question, its right answer, and everything the model is shown."""

    id: str  # stable: the same question has the same id in every run
    parts: tuple[Part, ...]
    target: tuple[str, ...]  # what the scorer looks for; one string for most tasks
    labels: tuple[str, ...] = ()  # e.g. ("steps=2", "shots=8"); for slicing a report

    @property
    def text(self) -> str:
        """The prompt as plain text, without any chat template."""
        return "".join(part.text for part in self.parts)


Scorer = Callable[[str, Sample], float]
"""completion, sample -> mark in [0, 1]; 0 for what is missing, truncated or cannot be read."""


@dataclass(frozen=True)
class Task:
    """Samples and how their answers are marked."""

    name: str
    ability: str  # which suite it stands for: arithmetic, retrieval, ...
    samples: tuple[Sample, ...]
    scorer: Scorer
    max_new_tokens: int
    protocol: Protocol = "prompt"
    stop: tuple[str, ...] = ()  # generation ends before any of these
    chance: float = 0.0  # what guessing scores
    higher_is_better: bool = True
    chat: bool = True  # use the model's chat template when it has one
    source: str = ""  # where the samples come from: data set, licence
    params: dict[str, object] = field(default_factory=dict)  # what the factory was called with
