"""How completions are marked: pure functions of a completion and its sample.

Numbers are compared exactly, never as floats: ``18.00`` is 18, and 0.3 is not 0.1 + 0.2 rounded.
What is missing, cut off, given twice or cannot be read scores 0.
"""

import re
from decimal import Decimal
from fractions import Fraction

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.tasks.base import Sample

_NUMBER = re.compile(
    r"""
    (?P<minus> (?<! [\w.)\]}%] )  # after a value it subtracts
        (?: [-\u2212][$€£¥]? | [$€£¥][-\u2212] ) )?
    (?<! [\w] ) (?<! [0-9]\. )    # not inside H2O, 123 or 1.2.3
    (?P<digits>
        [0-9]{1,3} (?: ,[0-9]{3} )+ (?![0-9]) (?: \.[0-9]+ )?  # 1,450.50
        | [0-9]+ (?: \.[0-9]+ )?                               # 1450.50
        | (?<! \. ) \.[0-9]+                                   # .50, but 18 in ...18
    )
    (?: / (?P<denominator> 0*[1-9][0-9]* ) (?! [0-9/] ) )?     # 3/4
    """,
    re.VERBOSE | re.ASCII,
)

_LETTER_FIRST = re.compile(r"[\s*_(\[]*([A-J])(?:[.):,*_\]]|\s*$|\s*\n)")
_LETTER_SAID = re.compile(r"(?i:(?:answer|option|choice)(?:\s+is)?\s*:?)[\s*_(\[]*([A-J])(?![\w'])")
_ANSWER_HEAD = re.compile(r"Answer[_ ]([0-9]{1,6})\**\s*:", re.IGNORECASE)
_ANSWER_SAID = re.compile(r"answer is", re.IGNORECASE)


def numbers(text: str) -> tuple[Fraction, ...]:
    """Return the numbers in a text, in order.

    Commas between groups of three digits, currency signs and percent signs are dropped. A minus is
    a sign unless it follows a value. ``3/4`` is one number.

    >>> [str(n) for n in numbers("She pays $1,450.00, then -3, which is 25% of 3/4.")]
    ['1450', '-3', '25', '3/4']
    >>> [str(n) for n in numbers("20-3 = 17, H2O")]
    ['20', '3', '17']
    """
    return tuple(_value(match) for match in _NUMBER.finditer(text))


def last_number(completion: str, sample: Sample) -> float:
    """Return 1 if the last number in the completion equals the target.

    >>> sample = Sample("a", (), target=("18",))
    >>> last_number("9 * 2 = 18. So she makes $18.00.", sample)
    1.0
    >>> last_number("The answer is 180.", sample)
    0.0
    """
    target = _number(_target(sample), sample)
    found = numbers(completion)
    return float(bool(found) and found[-1] == target)


def multiple_choice(completion: str, sample: Sample) -> float:
    """Return 1 if the letter chosen is the target; letters are A to J, in capitals.

    The letter the completion begins with counts, or else the last one it says the answer is.

    >>> sample = Sample("a", (), target=("B",))
    >>> multiple_choice(" B. Paris", sample), multiple_choice("I think the answer is (B).", sample)
    (1.0, 1.0)
    >>> multiple_choice("A good answer would be B", sample)
    0.0
    """
    target = _target(sample)
    if match := _LETTER_FIRST.match(completion):
        return float(match[1] == target)
    said = _LETTER_SAID.findall(completion)
    return float(bool(said) and said[-1] == target)


def contains_all(completion: str, sample: Sample) -> float:
    """Return the share of targets found; numbers as numbers, other text as whole words.

    >>> sample = Sample("a", (), target=("4711", "amber"))
    >>> contains_all("The numbers are 4,711 and 99; Amber.", sample)
    1.0
    >>> contains_all("47110, 14711 and ambergris", sample)
    0.0
    """
    _target(sample)
    found = [_contains(completion, target) for target in sample.target]
    return sum(found) / len(found)


def exact(completion: str, sample: Sample) -> float:
    r"""Return 1 if the completion is one of the targets, white space at the ends aside.

    >>> exact(" yes\n", Sample("a", (), target=("yes",)))
    1.0
    >>> exact("yes, indeed", Sample("a", (), target=("yes",)))
    0.0
    """
    _target(sample)
    return float(completion.strip() in {target.strip() for target in sample.target})


def numbered_answers(completion: str, sample: Sample, *, first: int = 1) -> float:
    r"""Return the share of the questions answered rightly, matched by number.

    The targets are the answers to the questions ``first``, ``first + 1``, ... An answer is
    ``Answer_<i>: ... The answer is n``; one that is missing, or given twice, is wrong.

    >>> sample = Sample("a", (), target=("18", "1,450"))
    >>> numbered_answers("Answer_2: 29 * 50. The answer is $1450.\nAnswer_1: No idea.", sample)
    0.5
    """
    _target(sample)
    given = answers_by_number(completion)
    right = [
        given.get(i) == _number(target, sample) for i, target in enumerate(sample.target, first)
    ]
    return sum(right) / len(right)


def answers_by_number(completion: str) -> dict[int, Fraction]:
    """Return the number given for each ``Answer_<i>:`` that is answered exactly once.

    >>> answers_by_number("Answer_9: The answer is 5. Answer_10: The answer")
    {9: Fraction(5, 1)}
    """
    _, *pieces = _ANSWER_HEAD.split(completion)
    indices = [int(index) for index in pieces[::2]]
    answers = {}
    for index, text in zip(indices, pieces[1::2], strict=True):
        said = _ANSWER_SAID.split(text)[1:]
        found = numbers(said[-1]) if said else ()
        if found and indices.count(index) == 1:
            answers[index] = found[0]
    return answers


def _value(match: re.Match[str]) -> Fraction:
    digits = match["digits"].replace(",", "")
    # By way of Decimal: int() refuses the thousands of digits a model in a loop may write.
    value = Fraction(Decimal(digits)) / Fraction(Decimal(match["denominator"] or 1))
    return -value if match["minus"] else value


def _number(target: str, sample: Sample) -> Fraction:
    found = numbers(target)
    if len(found) != 1:
        raise InvalidArgument(f"sample {sample.id!r}: target {target!r} must be one number")
    return found[0]


def _target(sample: Sample) -> str:
    if not sample.target:
        raise InvalidArgument(f"sample {sample.id!r} has no target to compare with")
    return sample.target[0]


def _contains(completion: str, target: str) -> bool:
    if match := _NUMBER.fullmatch(target):
        return _value(match) in numbers(completion)
    return re.search(rf"(?<!\w){re.escape(target)}(?!\w)", completion, re.IGNORECASE) is not None
