"""GSM8K: school word problems, and worked examples to show before them.

Cobbe et al., 2021, https://arxiv.org/abs/2110.14168 (problems)
Wei et al., 2022, https://arxiv.org/abs/2201.11903 (examples)
"""

from dataclasses import dataclass

from pytest_kvguard.tasks.load import HubSet, Row, load, load_vendored, unique_ids
from pytest_kvguard.tasks.numerals import numbers

SHOTS = 8
"""How many worked examples there are."""

SOURCE = "GSM8K test split (MIT), examples of Wei et al., 2022"

_FIELDS = {"question": (str,), "answer": (str,)}


@dataclass(frozen=True)
class Problem:
    """A question and the number that answers it."""

    id: str
    question: str
    target: str


@dataclass(frozen=True)
class WorkedExample:
    """A question and a chain of thought that ends with "The answer is n."."""

    question: str
    answer: str


def problems(data: str | None) -> list[Problem]:
    """Return the problems of a file or hub data set, or the 100 that come with this package.

    A row has ``question`` and ``answer``, both text; the answer is a number or ends with
    ``#### number``. An optional ``id`` must be unique.
    """
    rows = (
        load_vendored("gsm8k_questions.jsonl", _FIELDS)
        if data is None
        else load(data, _FIELDS, HubSet("main", "test"))
    )
    ids = unique_ids(rows, "gsm8k")
    return [
        Problem(name, row.values["question"], _target(row))
        for name, row in zip(ids, rows, strict=True)
    ]


def worked_examples(shots: int) -> list[WorkedExample]:
    """Return the first so many worked examples."""
    rows = load_vendored("gsm8k_shots.jsonl", _FIELDS)[:shots]
    return [WorkedExample(row.values["question"], row.values["answer"]) for row in rows]


def _target(row: Row) -> str:
    target: str = row.values["answer"].rpartition("####")[2].strip()
    if len(numbers(target)) != 1:
        raise row.wrong("answer", f"must be one number or end with '#### number', got {target!r}")
    return target
