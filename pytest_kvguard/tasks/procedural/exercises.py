"""How the procedural tasks are drawn: exercises with worked answers, and what is held out."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Literal

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.tasks.base import Part, Sample
from pytest_kvguard.tasks.checks import check_count, check_seed

Split = Literal["train", "test"]
"""Tasks are drawn from ``test``; a model of ours may be trained on ``train`` alone."""

STOP = "\n\n"
"""What follows every answer."""


@dataclass(frozen=True)
class Exercise:
    """A sample and the answer that a perfect model writes, up to the stop string."""

    sample: Sample
    answer: str


Draw = Callable[[Random], Exercise]


def exercise(
    task: str, parts: list[Part], answer: str, target: tuple[str, ...], labels: tuple[str, ...] = ()
) -> Exercise:
    """Join parts and answer; the id is a digest of the prompt, so equal prompts share it."""
    text = "".join(part.text for part in parts)
    return Exercise(Sample(f"{task}-{_digest(text).hex()}", tuple(parts), target, labels), answer)


def split_of(instance: str) -> Split:
    """Return where an instance belongs: one in ten, chosen by a digest of its text, is ``test``."""
    return "test" if int.from_bytes(_digest(instance)) % 10 == 0 else "train"


def draw_samples(draw: Draw, n: int, seed: int) -> tuple[Sample, ...]:
    """Draw ``n`` different samples; the first k of a larger n are those of n = k.

    Raises InvalidArgument for n < 1, a seed that is no whole number, or when the task has too few
    different samples.
    """
    check_count("n", n, 1, 100_000)
    check_seed(seed)
    rng = Random(seed)
    found: dict[str, Sample] = {}
    for _ in range(20 * n):
        sample = draw(rng).sample
        found.setdefault(sample.id, sample)
        if len(found) == n:
            return tuple(found.values())
    raise InvalidArgument(f"only {len(found)} different samples can be drawn, n is {n}; ask fewer")


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=6).digest()
