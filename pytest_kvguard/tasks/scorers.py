"""How completions are marked: pure functions of a completion and its sample.

Numbers are compared exactly, never as floats: ``18.00`` is 18, and 0.3 is not 0.1 + 0.2 rounded.
What is missing, cut off, given twice or cannot be read scores 0, and so does what is only in a
reasoning trace.
"""

import re
from fractions import Fraction

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.tasks.base import Sample
from pytest_kvguard.tasks.final_letter import final_letter
from pytest_kvguard.tasks.final_number import final_number, stated_numbers
from pytest_kvguard.tasks.numerals import numbers, the_number
from pytest_kvguard.tasks.traces import split_traces
from pytest_kvguard.tasks.turns import turns

_ANSWER_HEAD = re.compile(r"Answer[_ ]([0-9]{1,6})\**\s*:", re.IGNORECASE)


def last_number(completion: str, sample: Sample) -> float:
    r"""Return 1 if the number the completion answers with equals the target.

    That is ``#### n``, ``\boxed{n}`` or "the answer is n", the last of its kind, in this order, or
    else the last number; see `final_number`. What comes after a stated answer never counts.

    >>> sample = Sample("a", (), target=("18",))
    >>> last_number("9 * 2 = 18. So she makes $18.00.", sample)
    1.0
    >>> last_number("The answer is 18. Let me check: Step 3.", sample)
    1.0
    >>> last_number("The answer is 180.", sample)
    0.0
    """
    target = _number(_target(sample), sample)
    return float(final_number(split_traces(completion).answer) == target)


def multiple_choice(completion: str, sample: Sample) -> float:
    r"""Return 1 if the letter chosen is the target; letters are A to J, in capitals.

    That is ``\boxed{B}``, the last letter the completion says the answer is, or else the letter it
    begins with; see `final_letter`.

    >>> sample = Sample("a", (), target=("B",))
    >>> multiple_choice(" B. Paris", sample), multiple_choice("I think the answer is (B).", sample)
    (1.0, 1.0)
    >>> multiple_choice("Because B is a letter", sample)
    0.0
    """
    target = _target(sample)
    return float(final_letter(split_traces(completion).answer) == target)


def contains_all(completion: str, sample: Sample) -> float:
    """Return the share of targets found; numbers as numbers, other text as whole words.

    >>> sample = Sample("a", (), target=("4711", "amber"))
    >>> contains_all("The numbers are 4,711 and 99; Amber.", sample)
    1.0
    >>> contains_all("47110, 14711 and ambergris", sample)
    0.0
    """
    _target(sample)
    answer = split_traces(completion).answer
    given = numbers(answer)
    found = [_contains(answer, given, target) for target in sample.target]
    return sum(found) / len(found)


def exact(completion: str, sample: Sample) -> float:
    r"""Return 1 if the completion is one of the targets, white space at the ends aside.

    >>> exact(" yes\n", Sample("a", (), target=("yes",)))
    1.0
    >>> exact("yes, indeed", Sample("a", (), target=("yes",)))
    0.0
    """
    _target(sample)
    answer = split_traces(completion).answer.strip()
    return float(answer in {target.strip() for target in sample.target})


def numbered_answers(completion: str, sample: Sample, *, first: int = 1) -> float:
    r"""Return the share of the questions answered rightly, matched by number.

    The targets are the answers to the questions ``first``, ``first + 1``, ... An answer is
    ``Answer_<i>: ... The answer is n`` (or ``#### n``, or ``\boxed{n}``); one that is missing, or
    given twice, is wrong.

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
    _, *pieces = _ANSWER_HEAD.split(split_traces(completion).answer)
    indices = [int(index) for index in pieces[::2]]
    answers = {}
    for index, text in zip(indices, pieces[1::2], strict=True):
        stated = next(filter(None, map(stated_numbers, turns(text))), [None])[-1]
        if stated is not None and indices.count(index) == 1:
            answers[index] = stated
    return answers


def _number(target: str, sample: Sample) -> Fraction:
    found = numbers(target)
    if len(found) != 1:
        raise InvalidArgument(f"sample {sample.id!r}: target {target!r} must be one number")
    return found[0]


def _target(sample: Sample) -> str:
    if not sample.target:
        raise InvalidArgument(f"sample {sample.id!r} has no target to compare with")
    return sample.target[0]


def _contains(answer: str, given: tuple[Fraction, ...], target: str) -> bool:
    if (value := the_number(target)) is not None:
        return value in given
    return re.search(rf"(?<!\w){re.escape(target)}(?!\w)", answer, re.IGNORECASE) is not None
