"""A few facts among filler sentences; the question asks for one of them."""

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
from pytest_kvguard.tasks.procedural.words import (
    ADJECTIVES,
    MOVES,
    NAMES,
    PLACES,
    PREPOSITIONS,
    THINGS,
)

VALUES = range(10, 100)


def retrieval_facts(*, n: int = 100, sentences: int = 40, facts: int = 4, seed: int = 0) -> Task:
    """Return ``n`` documents of ``sentences`` (facts..120) sentences, ``facts`` (1..16) of them.

    A filler sentence has eight words and a full stop: 110 sentences are about 1,000 tokens.
    """
    check_count("facts", facts, 1, 16)
    check_count("sentences", sentences, facts, 120)
    return Task(
        name="retrieval_facts",
        ability="retrieval",
        samples=draw_samples(lambda rng: draw_document(rng, sentences, facts), n, seed),
        scorer=first_number_is_right,
        max_new_tokens=24,
        stop=(STOP,),
        chat=False,
        source="procedural",
        params={"sentences": sentences, "facts": facts, "seed": seed},
    )


def draw_document(rng: Random, sentences: int, facts: int) -> Exercise:
    """Draw one document; the fact asked for is of the test split, the others are of ``train``."""
    thing = rng.choice(THINGS)
    asked, *others = rng.sample(NAMES, facts)
    value = draw_value(rng, asked, thing, "test")
    values = {asked: value} | {name: draw_value(rng, name, thing, "train") for name in others}
    lines = [fact(name, thing, value) for name, value in values.items()]
    parts = document_parts(rng, lines, sentences)
    parts.append(Part("question", f"Q: {question(asked, thing)}\nA:"))
    labels = (f"sentences={sentences}", f"facts={facts}")
    answer = f" {fact(asked, thing, value)}"
    return exercise("retrieval_facts", parts, answer, (str(value),), labels)


def document_parts(rng: Random, facts: list[str], sentences: int) -> list[Part]:
    """Scatter facts among filler, a unit per sentence; a paragraph end closes the last one."""
    lines = facts + [filler(rng) for _ in range(sentences - len(facts))]
    rng.shuffle(lines)
    texts = [lines[0], *(f" {line}" for line in lines[1:])]
    texts[-1] += "\n\n"
    return [Part("document", text, unit=f"sentence {i}") for i, text in enumerate(texts)]


def fact(name: str, thing: str, value: int) -> str:
    """Return ``The code of Ana is 47.``."""
    return f"The {thing} of {name} is {value}."


def question(name: str, thing: str) -> str:
    """Return ``What is the code of Ana?``."""
    return f"What is the {thing} of {name}?"


def filler(rng: Random) -> str:
    """Draw a sentence that holds no fact: ``The old bridge rests near the quiet river.``."""
    first, second = rng.sample(PLACES, 2)
    old, quiet = rng.sample(ADJECTIVES, 2)
    middle = f"{rng.choice(MOVES)} {rng.choice(PREPOSITIONS)}"
    return f"The {old} {first} {middle} the {quiet} {second}."


def draw_value(rng: Random, name: str, thing: str, split: Split) -> int:
    """Draw a value that makes this fact one of ``split``."""
    while True:
        value = rng.choice(VALUES)
        if split_of(fact(name, thing, value)) == split:
            return value


def first_number_is_right(completion: str, sample: Sample) -> float:
    """Mark 1 if the first number of the completion is the target."""
    return float(re.findall(r"\d+", completion)[:1] == list(sample.target))
