"""Numbers as people and models write them, read exactly: as fractions, never as floats."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from pytest_kvguard.tasks.markup import plain

_MINUS = "-\u2010\u2011\u2012\u2013\u2212\uff0d"  # hyphens, figure and en dash, minus
_APART = ",\u00a0\u2009\u202f"  # between groups of three digits: a comma or a narrow space

_NUMBER = re.compile(
    rf"""
    (?P<minus> (?<! [\w.)\]}}%] )  # after a value it subtracts
        (?: [{_MINUS}][$€£¥]? | [$€£¥][{_MINUS}] ) )?
    (?<! [\w] ) (?<! [0-9]\. )     # not inside H2O, 123 or 1.2.3
    (?P<digits>
        [0-9]{{1,3}} (?: [{_APART}][0-9]{{3}} )+ (?![0-9]) (?: \.[0-9]+ )?  # 1,450.50
        | [0-9]+ (?: \.[0-9]+ )?                                            # 1450.50
        | (?<! \. ) \.[0-9]+                                                # .50, not ...18
    )
    (?:
        [/\u2044] (?P<denominator> 0*[1-9][0-9]* ) (?! [0-9/] )              # 3/4
        | (?<! \. ) (?P<part> [ ]([0-9]+)[/\u2044](0*[1-9][0-9]*) (?! [0-9/] ) )  # 2 1/2
    )?
    """,
    re.VERBOSE | re.ASCII,
)


@dataclass(frozen=True)
class Numeral:
    """A number in a text, from character ``start`` to ``end`` (exclusive)."""

    start: int
    end: int
    value: Fraction


def numbers(text: str) -> tuple[Fraction, ...]:
    r"""Return the numbers in a text, in order.

    Separators between groups of three digits, currency signs, percent signs and LaTeX are dropped.
    A minus is a sign unless it follows a value. ``3/4`` is one number, and so is ``2 1/2``.

    >>> [str(n) for n in numbers("She pays $1,450.00, then -3, which is 25% of 3/4.")]
    ['1450', '-3', '25', '3/4']
    >>> [str(n) for n in numbers(r"20-3 = 17, H2O, 2 1/2, \frac{3}{4}, \$5")]
    ['20', '3', '17', '5/2', '3/4', '5']
    """
    return tuple(numeral.value for numeral in numerals(plain(text)))


def numerals(text: str) -> Iterator[Numeral]:
    """Yield the numbers of a text that holds no markup, with their places."""
    at = 0
    while match := _NUMBER.search(text, at):
        yield _numeral(match)
        at = match.start("part") if _split(match) else match.end()


def the_number(text: str) -> Fraction | None:
    """Return the number that is all of a text, or None.

    >>> the_number("1,450"), the_number("amber 7")
    (Fraction(1450, 1), None)
    """
    match = _NUMBER.fullmatch(text)
    return None if match is None or _split(match) else _numeral(match).value


def _numeral(match: re.Match[str]) -> Numeral:
    # By way of Decimal: int() refuses the thousands of digits a model in a loop may write.
    value = Fraction(Decimal(re.sub(rf"[{_APART}]", "", match["digits"])))
    end = match.end()
    if match["denominator"]:
        value /= Fraction(Decimal(match["denominator"]))
    elif _split(match):
        end = match.start("part")
    elif match["part"]:
        value += _part(match)
    return Numeral(match.start(), end, -value if match["minus"] else value)


def _split(match: re.Match[str]) -> bool:
    """Whether what follows is a number of its own: nobody writes 2 4/3 for 3 1/3."""
    return bool(match["part"]) and ("." in match["digits"] or _part(match) >= 1)


def _part(match: re.Match[str]) -> Fraction:
    above, below = re.split(r"[/\u2044]", match["part"])
    return Fraction(Decimal(above.strip())) / Fraction(Decimal(below))
