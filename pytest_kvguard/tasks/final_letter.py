r"""The letter a reply chooses, A to J, in capitals, whatever it says before and after.

In this order: ``\boxed{B}``, a line of nothing but the letter at the start, ``#### B``, the last
of "the answer is B", "B is correct" and "I choose B", the letter the reply begins with. Base
models go on and invent the next question, so that the first turn with a choice in it decides.
"""

import re
from collections.abc import Iterator

from pytest_kvguard.tasks.markup import boxes, plain
from pytest_kvguard.tasks.statements import statements
from pytest_kvguard.tasks.turns import turns

_GOES_ON = r"(?!because|since|as|and|or|for|is|here|in|with|but|due|given|not|by)"
_LETTER = (
    r"[\s(\[{\"'<\u201c\u2018]*([A-J])"
    r"(?![\w'\u2019+#*]|\.\w|-\w)"  # Bonn, B's, C++, C#, A*, D.C., C-section
    rf"(?!(?<=[AI])\s+{_GOES_ON}[a-z])"  # an article, or who speaks
)
_ONLY = re.compile(rf"\s*(?i:(?:the\s+)?(?:letter|option|choice|answer)\s*)?{_LETTER}")
_OTHER = re.compile(
    r"[\s)\]}.]*(?:(?:,?\s*\b(?:or|and)\b|[/&])\s*[(\[]*[A-J](?![\w'\u2019])"
    r"|,\s*[(\[]*[A-J][)\]]*\s*(?:[.,;)\]]|$|\b(?:or|and)\b))"
)
_FOUND_RIGHT = re.compile(
    r"(?:^|[.,:;!?(\n]\s*|\b(?i:option|choice|answer|so|thus|hence|therefore|that|think|believe)\s+)"
    rf"{_LETTER}[)\]]*\s+(?:is|must\s+be)\s+(?:the\s+)?(?:correct|right|best)\b"
)
_CHOSEN = re.compile(
    r"\b(?i:choose|chose|pick|select|go\s+with)\s+"
    rf"(?i:the\s+)?(?i:letter|option|choice|answer)?{_LETTER}"
)
_HASHED = re.compile(r"(?<!#)####[ \t]*[(\[]?([A-J])[)\].]*[ \t]*(?:\n|$)")
_LINE = re.compile(r"[\s(\[]*([A-J])[.)\]:,]*\s*(?:\n|$)")
_BEGINS = re.compile(r"\s*(?i:option\s|choice\s)?[\s(\[]*([A-J])(?:[.):,\]]|\s*$|\s*\n)")
_HEAD = re.compile(r"\s*A:\s*(?=[(\[]*[A-J](?:[.):,\]]|\s*$|\s*\n))")
_CHOICES = re.compile(r"^[ \t(]*A[.)]", re.MULTILINE)


def final_letter(text: str) -> str | None:
    r"""Return the letter a reply chooses; None where there is none, or more than one.

    >>> final_letter("A. Paris? No. The answer is (B)."), final_letter(r"So $\boxed{\text{B}}$.")
    ('B', 'B')
    >>> final_letter("The answer is A or B."), final_letter("A good question.")
    (None, None)
    """
    for turn in turns(text):
        if boxed := list(_boxed(turn)):
            return boxed[-1]
        answer = plain(turn).replace("$", "")
        if head := _HEAD.match(answer):
            answer = answer[head.end() :]
        answer = _without_next_choices(answer)
        if line := _LINE.match(answer):
            return line[1]
        if hashed := _HASHED.findall(answer):
            return hashed[-1]
        if said := list(_said(answer)):
            return said[-1]
        if begins := _BEGINS.match(answer):
            return begins[1]
    return None


def _boxed(text: str) -> Iterator[str | None]:
    for content in boxes(text):
        yield from _chosen(plain(content).replace("$", ""))


def _said(text: str) -> Iterator[str | None]:
    """Yield each letter that is said to be right, in order; None for two at a time."""
    found: list[tuple[int, str | None]] = []
    found += [(match.start(1), match[1]) for match in _FOUND_RIGHT.finditer(text)]
    found += [(match.start(1), match[1]) for match in _CHOSEN.finditer(text)]
    for statement in statements(text):
        found += [(statement.start, letter) for letter in _chosen(statement.text)]
    yield from (letter for _, letter in sorted(found, key=lambda one: one[0]))


def _chosen(statement: str) -> Iterator[str | None]:
    if match := _ONLY.match(statement):
        yield None if _OTHER.match(statement, match.end()) else match[1]


def _without_next_choices(text: str) -> str:
    """Cut where choices are listed after the reply began with one: of an invented question."""
    listed = _CHOICES.search(text, 1)
    return text[: listed.start()] if listed and _BEGINS.match(text) else text
