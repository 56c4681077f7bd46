"""World knowledge: what is asked is in the weights, the shots only show the format."""

import re
from random import Random

from pytest_kvguard.tasks.base import Part, Sample, Task
from pytest_kvguard.tasks.checks import check_count
from pytest_kvguard.tasks.procedural.exercises import (
    STOP,
    Exercise,
    Split,
    draw_samples,
    exercise,
    split_of,
)
from pytest_kvguard.tasks.procedural.words import CAPITALS, OPPOSITES, YOUNG

FACTS = {
    **{f"What is the capital of {country}?": city for country, city in CAPITALS.items()},
    **{f"What is the opposite of {word}?": other for word, other in OPPOSITES.items()},
    **{f"What is a young {animal} called?": young for animal, young in YOUNG.items()},
}
"""Every question, with its answer of one word."""


def facts(*, n: int = 100, shots: int = 16, seed: int = 0) -> Task:
    """Return ``n`` questions, each after ``shots`` (1..32) others with their answers."""
    check_count("shots", shots, 1, 32)
    return Task(
        name="facts",
        ability="world knowledge",
        samples=draw_samples(lambda rng: draw_fact(rng, shots), n, seed),
        scorer=first_word_is_right,
        max_new_tokens=12,
        stop=(STOP,),
        chat=False,
        source="procedural",
        params={"shots": shots, "seed": seed},
    )


def draw_fact(rng: Random, shots: int) -> Exercise:
    """Draw one question of the test split; none of its shots answers it."""
    while True:
        asked, *shown = rng.sample(sorted(FACTS), shots + 1)
        if split_after(shown[-1], asked) == "test":
            break
    parts = [
        Part("shot", f"Q: {one}\nA: {FACTS[one]}.{STOP}", unit=f"shot {i}")
        for i, one in enumerate(shown)
    ]
    parts.append(Part("question", f"Q: {asked}\nA:"))
    return exercise("facts", parts, f" {FACTS[asked]}.", (FACTS[asked],), (f"shots={shots}",))


def split_after(previous: str, asked: str) -> Split:
    """Return where a question belongs when it follows another one.

    The facts themselves must be learned, so what is held out is a pair of neighbours.
    """
    return split_of(f"{previous} {asked}")


def first_word_is_right(completion: str, sample: Sample) -> float:
    """Mark 1 if the first word of the completion is the target, whatever its case."""
    words = re.findall(r"[^\W\d_]+", completion.lower())
    return float(words[:1] == [sample.target[0].lower()])
