"""What a run leaves behind: plain values, no tensors and no model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.specs import Spec
from pytest_kvguard.tasks.base import Protocol

FULL = "full"
"""The policy of a baseline: the full cache."""


@dataclass(frozen=True)
class Answer:
    """What the model said to one sample."""

    text: str
    tokens: int  # generated, a stop token included
    stopped: bool  # by itself; False: cut off at the most new tokens, in a trace or in a loop
    looped: bool = False  # cut off because it went round in a loop
    trace: str = ""  # what a reasoning model wrote before it answered


@dataclass(frozen=True)
class Held:
    """The fraction of the prompt's tokens really held, over samples, layers and heads."""

    min: float
    mean: float
    max: float


@dataclass(frozen=True)
class Counts:
    """What a run cost the model."""

    prefills: int = 0  # prompts or contexts prefilled, once for all cells of a task
    forwards: int = 0  # passes of the model that carried rows of this run, prefills not among them
    tokens: int = 0  # tokens of this run's rows that were fed, the prefilled prompt not among them
    own_prefills: int = 0  # prefills on top, for this run alone

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.prefills + other.prefills,
            self.forwards + other.forwards,
            self.tokens + other.tokens,
            self.own_prefills + other.own_prefills,
        )


@dataclass(frozen=True)
class Fidelity:
    """How well the compressed cache predicts the baseline's answers, token by token."""

    kl: float  # mean KL(full || compressed) in nats; 0 is lossless
    agreement: float  # fraction of tokens with the same argmax


@dataclass(frozen=True)
class Run:
    """All samples of one cell, or of the baseline.

    Raises InvalidArgument for a score outside [0, 1], a keep ratio outside (0, 1] or a chance
    outside [0, 1).
    """

    task: str
    policy: str  # FULL for the baseline
    params: Mapping[str, Any]  # the policy's
    ratio: float  # keep ratio asked for, (0, 1]; 1 for the baseline
    protocol: Protocol
    scores: Mapping[str, float]  # by sample id, [0, 1]
    answers: Mapping[str, Answer] = field(default_factory=dict)  # by sample id
    clusters: Mapping[str, str] = field(default_factory=dict)  # by sample id; none: on its own
    saves: str = "positions"  # what the keep ratio is a share of: positions, bytes or reads
    held: Held | None = None  # None: not measured
    read: float | None = None  # positions read / held; None: all that is held is read
    bytes_full: int = 0  # of all positions' keys and values, summed over samples
    bytes_held: int = 0  # of what was held instead
    bytes_padding: int = 0  # what heads that keep less than others of their layer add to that
    peak_bytes: int | None = None  # the most a GPU held at a time; None: not measured
    counts: Counts = Counts()
    fidelity: Fidelity | None = None  # None for the baseline
    seconds: float = 0.0
    evicted: bool = False  # whether a generated token was evicted while decoding
    disagreements: int = 0  # baseline answers that round otherwise when read in one pass
    error: str | None = None  # why the run ended before its time
    units: str | None = None  # what the policy keeps whole; None: it keeps tokens
    ability: str = ""  # the task's
    chance: float = 0.0  # the task's: what guessing scores
    higher_is_better: bool = True  # the task's

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise InvalidArgument(f"{self.label}: keep ratio must be in (0, 1], got {self.ratio!r}")
        if not 0 <= self.chance < 1:
            raise InvalidArgument(
                f"{self.label}: what guessing scores must be in [0, 1), got {self.chance!r}"
            )
        for sample, score in self.scores.items():
            if not 0 <= score <= 1:  # nan fails too
                raise InvalidArgument(
                    f"{self.label}: the score of sample {sample!r} must be in [0, 1], got {score!r}"
                )

    @property
    def label(self) -> str:
        """Task, policy and ratio, as in ``retrieval snapkv(window=16)@0.25``."""
        return f"{self.task} {Spec(self.policy, self.params)}@{self.ratio:g}"

    @property
    def mean(self) -> float:
        """Mean score; nan without samples."""
        return math.fsum(self.scores.values()) / len(self.scores) if self.scores else math.nan

    @property
    def contexts(self) -> list[tuple[str, str]]:
        """The cluster of each sample that was scored, in their order; all differ if none share."""
        return [
            ("shared", self.clusters[sample]) if sample in self.clusters else ("alone", sample)
            for sample in self.scores
        ]

    @property
    def remains(self) -> str:
        """What is left of what the policy saves, as in ``24% held``."""
        if self.saves == "bytes" and self.bytes_full:  # 0: no sample came to its end
            return f"{self.bytes_held / self.bytes_full:.0%} of the bytes held"
        if self.saves == "reads" and self.read is not None:
            return f"{self.read:.0%} read"
        return f"{self.held.mean:.0%} held" if self.held else "not measured"

    @property
    def truncated(self) -> int:
        """How many answers were cut off before the model ended them, loops not among them."""
        return sum(not (answer.stopped or answer.looped) for answer in self.answers.values())

    @property
    def looped(self) -> int:
        """How many answers were cut off because they went round in a loop."""
        return sum(answer.looped for answer in self.answers.values())

    @property
    def endings(self) -> dict[str, int]:
        """How many answers the model ended, and how many were truncated or looped."""
        ended = len(self.answers) - self.truncated - self.looped
        return {"ended": ended, "truncated": self.truncated, "looped": self.looped}
