"""Retrieval: numbers hidden in filler, asked for by their keys.

Hsieh et al., 2024, RULER, https://arxiv.org/abs/2404.06654 (needle in a haystack; ``needles`` and
``values`` span its single, multi-key and multi-value tasks)

Differs from the paper: own words for keys and noise, lengths in words and not in tokens, several
questions about one context, and a number counts only when it is found whole.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from math import ceil
from typing import Literal

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.tasks.base import Part, Sample, Task
from pytest_kvguard.tasks.checks import check_count, check_seed
from pytest_kvguard.tasks.filler import NOISE, prose
from pytest_kvguard.tasks.scorers import contains_all

FILLERS: dict[str, Callable[[], tuple[str, ...]]] = {"noise": lambda: NOISE, "prose": prose}

INSTRUCTION = (
    "Some special magic numbers are hidden in the following text. "
    "Remember them: you will be asked for them afterwards.\n\n"
)

ADJECTIVES = (
    "amber ancient brave calm clever copper crimson dusty early gentle golden hollow humble icy "
    "jolly lively lunar mellow misty noble olive patient proud quiet rapid rustic scarlet silent "
    "silver sleepy stormy velvet wooden"
)

NOUNS = (
    "anchor bakery beacon bridge canyon carpet castle cellar compass cottage falcon ferry forest "
    "fountain garden harbor island kettle ladder lantern library market meadow mirror orchard "
    "otter palace pebble piano quarry river saddle temple tunnel valley violin window"
)


@dataclass(frozen=True)
class Haystack:
    """A context, and the numbers of each key hidden in it, in the order of asking."""

    parts: tuple[Part, ...]
    hidden: dict[str, tuple[str, ...]]


def retrieval(
    *,
    length: int = 400,
    needles: int = 5,
    values: int = 1,
    digits: int = 5,
    filler: Literal["noise", "prose"] = "noise",
    questions_per_context: int = 5,
    n: int = 100,
    seed: int = 0,
) -> Task:
    """Hide numbers in at most ``length`` words, and ask for those of one key.

    needles: keys in a context, each with ``values`` numbers of ``digits`` digits (4 to 18)
    filler: ``noise`` repeats five sentences; ``prose`` is the documentation of the Python that
        runs, so its prompts differ between Python versions
    questions_per_context: samples that share a context and ask for different keys of it
    n: samples

    Every sentence is a unit. The mark is the share of the key's numbers found.
    Raises InvalidArgument for numbers out of range and for a length that cannot hold the needles.
    """
    params: dict[str, object] = dict(locals())  # nothing but the parameters is local yet
    check_count("length", length, 1, 1_000_000)
    check_count("needles", needles, 1, len(ADJECTIVES.split()))
    check_count("values", values, 1, 100)
    check_count("digits", digits, 4, 18)
    check_count("questions_per_context", questions_per_context, 1, needles)
    check_count("n", n, 1, 100_000)
    check_seed(seed)
    if not isinstance(filler, str) or filler not in FILLERS:
        raise InvalidArgument(f"filler must be one of {', '.join(FILLERS)}, got {filler!r}")
    sentences = FILLERS[filler]()
    name = f"{filler}-{length}w-{needles}x{values}x{digits}-seed{seed}"
    haystacks = []
    for i in range(ceil(n / questions_per_context)):
        rng = random.Random(f"{name}-{i}")
        hidden = _hidden(rng, needles, values, digits)
        haystacks.append(Haystack(_context(rng, hidden, sentences, length), hidden))
    samples = []
    for i in range(n):
        at, question = divmod(i, questions_per_context)
        samples.append(_sample(f"retrieval-{name}-{at:03d}-{question}", haystacks[at], question))
    return Task(
        name="retrieval",
        ability="retrieval",
        samples=tuple(samples),
        scorer=contains_all,
        max_new_tokens=32 + values * (digits + 4),  # a token a digit, and what stands between
        source="generated, after RULER",
        params=params,
    )


def _hidden(
    rng: random.Random, needles: int, values: int, digits: int
) -> dict[str, tuple[str, ...]]:
    adjectives = rng.sample(ADJECTIVES.split(), needles)
    nouns = rng.sample(NOUNS.split(), needles)
    numbers = iter(rng.sample(range(10 ** (digits - 1), 10**digits), needles * values))
    return {
        f"{adjective} {noun}": tuple(str(number) for number in islice(numbers, values))
        for adjective, noun in zip(adjectives, nouns, strict=True)
    }


def _context(
    rng: random.Random, hidden: dict[str, tuple[str, ...]], sentences: Sequence[str], length: int
) -> tuple[Part, ...]:
    needles = [
        f"One of the special magic numbers for {key} is: {value}."
        for key, values in hidden.items()
        for value in values
    ]
    rng.shuffle(needles)
    used = len(f"{INSTRUCTION} {' '.join(needles)}".split())
    text = _filler(rng, sentences, length - used)
    if len(text) + 1 < len(needles):
        raise InvalidArgument(
            f"length={length} words cannot hold {len(needles)} needles apart; "
            f"use a greater length or fewer needles"
        )
    places = sorted(rng.sample(range(len(text) + 1), len(needles)), reverse=True)
    for place, needle in zip(places, needles, strict=True):
        text.insert(place, needle)
    units = [
        # Spaces in front, because that is where tokenizers put them.
        Part("document", f" {sentence}" if i else sentence, unit=f"sentence {i}")
        for i, sentence in enumerate(text)
    ]
    return (Part("instruction", INSTRUCTION), *units)


def _filler(rng: random.Random, sentences: Sequence[str], words: int) -> list[str]:
    """Return neighbouring sentences from a random one on, of at most so many words in all."""
    start = rng.randrange(len(sentences))
    text: list[str] = []
    for sentence in islice(cycle(sentences), start, None):
        words -= len(sentence.split())
        if words < 0:
            break
        text.append(sentence)
    return text


def _sample(name: str, haystack: Haystack, question: int) -> Sample:
    key, values = list(haystack.hidden.items())[question]
    asked = (
        f"\n\nWhat is the special magic number for {key} in the text above? "
        f"The special magic number for {key} is:"
        if len(values) == 1
        else f"\n\nWhat are the {len(values)} special magic numbers for {key} in the text above? "
        f"The special magic numbers for {key} are:"
    )
    return Sample(name, (*haystack.parts, Part("question", asked)), target=values)
