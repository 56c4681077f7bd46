"""Sentences without meaning for the task, to hide things among. None holds a digit."""

import re
from functools import cache

from pytest_kvguard.errors import Unavailable

NOISE = (
    "The wind moves the leaves.",
    "A cat sleeps in the sun.",
    "The bread is in the oven.",
    "People walk along the street.",
    "It will be evening soon.",
)


@cache
def prose() -> tuple[str, ...]:
    """Return English sentences of 6 to 40 words from CPython's own help topics, in their order.

    They differ between Python versions. Raises Unavailable where Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise Unavailable(
            "this Python has no pydoc_data.topics; install the full standard library, "
            "or use filler='noise'"
        ) from None
    return tuple(
        sentence
        for _, text in sorted(topics.items())
        for paragraph in re.split(r"\n\s*\n", text)
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))
        if _is_english(sentence)
    )


def _is_english(sentence: str) -> bool:
    plain = re.fullmatch(r"[A-Z][A-Za-z ,;:'\"()-]*[.!?]", sentence)
    return plain is not None and 6 <= len(sentence.split()) <= 40
