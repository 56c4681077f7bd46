r"""The number a reply gives as its answer, whatever it says before and after.

In this order: ``#### n``, ``\boxed{n}``, "the answer is n", each the last of its kind; where
nothing is stated, the last number. Base models go on and invent the next question, so that the
first turn with a number in it decides.
"""

import re
from collections.abc import Iterator
from fractions import Fraction

from pytest_kvguard.tasks.markup import before_open_box, boxes, plain
from pytest_kvguard.tasks.numerals import numerals
from pytest_kvguard.tasks.statements import statements
from pytest_kvguard.tasks.turns import turns

_HASHED = re.compile(r"(?<!\#)\#{4}(?!\#)[ \t:]*")
_ALONE = re.compile(
    r"%?[ \t]*(?:[^\W\d]+(?:[ \t]+[^\W\d]+)?)?[ \t]*(?:\([^)\n]*\))?[ \t]*[.!]?[ \t]*$"
)
"""What may follow the number of ``#### n`` on its line; ``#### 1. Add the eggs`` is a heading."""

_NEXT = r"[ \t]*[($€£¥]*[ \t]*(?=[.0-9])"
_UNIT = r"[ \t]*(?:[^\W\d]+[ \t]*)?"
_SIGN = r"[+*/\u00d7\u00f7\u00b7\u2212\u2013-]"  # also a multiplication sign, a division sign
_OPERATOR = re.compile(
    rf"(?:{_UNIT}(?:{_SIGN}|\bx\b|:(?=[0-9]))\*?|[ \t]*\^)[-\u2212]?{_NEXT}",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(rf"{_UNIT}(?:,[ \t]*)?\b(?:or|and|to)\b[ \t]*[-\u2212]?{_NEXT}")
_LIST = re.compile(
    r"(?:[ \t]*(?:,[ \t]*(?:(?:or|and)\b[ \t]*)?|(?:or|and)\b[ \t]*)"
    r"[$€£¥]?[-\u2212]?[0-9][0-9./]*)+[\s)]*"
)
_RESULT = re.compile(r"(?:=|\b(?:which|that) is|\bequals|\bmakes|\bgives)[ \t]*[($€£¥]*[ \t]*$")
_LOOK_BACK = 24  # characters: no longer is what says that a number is a result


def final_number(text: str) -> Fraction | None:
    r"""Return the number a reply answers with; None where there is none or it cannot be read.

    What is stated but is no single number ("18 or 19", "9 + 9") cannot be read.

    >>> final_number("The answer is 18 (in 2023)."), final_number(r"So \boxed{\$1{,}450}. Step 3")
    (Fraction(18, 1), Fraction(1450, 1))
    >>> final_number("The answer is 18 or 19."), final_number("2 * 9 = 18\n\nQ: Now 5?")
    (None, Fraction(18, 1))
    """
    for turn in turns(text):
        if stated := stated_numbers(turn):
            return stated[-1]
        if found := list(numerals(plain(before_open_box(turn)))):
            return found[-1].value
    return None


def stated_numbers(text: str) -> list[Fraction | None]:
    """Return what a text states as its answer, in order, all in the first form of stating it.

    None stands for what is stated but is no single number.
    """
    bare = plain(text)
    return list(_hashed(bare)) or list(_boxed(text)) or list(_said(bare))


def _hashed(text: str) -> Iterator[Fraction]:
    for match in _HASHED.finditer(text):
        line = text[match.end() :].split("\n", 1)[0]
        first = next(numerals(line), None)
        if first and not line[: first.start].strip("$€£¥ \t") and _ALONE.match(line, first.end):
            yield first.value


def _boxed(text: str) -> Iterator[Fraction | None]:
    for content in map(plain, boxes(text)):
        if any(numerals(content)):
            yield _single(content)


def _said(text: str) -> Iterator[Fraction | None]:
    for statement in statements(text):
        if any(numerals(statement.text)):
            yield _single(statement.text)


def _single(sentence: str) -> Fraction | None:
    """Return the number a statement begins with, or what it says a calculation comes to."""
    first, *others = numerals(sentence)
    if _LIST.fullmatch(sentence, first.end):
        return None
    if not (_OPERATOR.match(sentence, first.end) or _ALTERNATIVE.match(sentence, first.end)):
        return first.value
    for other in others:
        before = sentence[max(0, other.start - _LOOK_BACK) : other.start]
        if _RESULT.search(before) and not _OPERATOR.match(sentence, other.end):
            return other.value
    return None
