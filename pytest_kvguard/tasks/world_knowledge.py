"""World knowledge: MMLU questions with four choices, answered by writing a letter.

Hendrycks et al., 2021, https://arxiv.org/abs/2009.03300

Differs from the paper: shots are of any subject and long, questions are short, so that a question
is a small part of its prompt; the letter is generated, not chosen by its probability.
"""

from statistics import fmean
from string import ascii_uppercase

from pytest_kvguard.tasks.base import Part, Sample, Task
from pytest_kvguard.tasks.checks import check_count
from pytest_kvguard.tasks.load import HubSet, Row, load, load_vendored, unique_ids
from pytest_kvguard.tasks.scorers import multiple_choice

SHOTS = 5
"""How many shots a set of them holds."""

INSTRUCTION = "Answer each multiple choice question with the letter of the right choice.\n\n"

_FIELDS = {"question": (str,), "choices": (list,), "answer": (str, int)}


def world_knowledge(*, shots: int = SHOTS, data: str | None = None) -> Task:
    """Ask multiple choice questions after ``shots`` (0 to 5) answered ones, each of them a unit.

    data: a file of JSON lines with ``question``, ``choices`` (2 to 10 texts) and ``answer`` (a
        letter, or an index from 0), or a hub data set such as ``cais/mmlu``, whose test split is
        read; by default 200 questions of at most 250 characters, 50 for each letter

    Neighbouring samples share their shots, so that the prefill of a context serves many.
    """
    check_count("shots", shots, 0, SHOTS)
    rows = (
        load_vendored("mmlu_questions.jsonl", _FIELDS)
        if data is None
        else load(data, _FIELDS, HubSet("all", "test"))
    )
    contexts = _contexts(shots)
    samples = tuple(
        Sample(
            name,
            (*contexts[i * len(contexts) // len(rows)], Part("question", _asked(row))),
            target=(_letter(row),),
            labels=(f"shots={shots}",),
        )
        for i, (name, row) in enumerate(zip(unique_ids(rows, "mmlu"), rows, strict=True))
    )
    return Task(
        name="world_knowledge",
        ability="world knowledge",
        samples=samples,
        scorer=multiple_choice,
        max_new_tokens=16,
        stop=("\n\n",),
        chance=fmean(1 / len(row.values["choices"]) for row in rows),
        source=data or "MMLU (MIT): 200 short questions, shots from its dev split",
        params={"shots": shots, "data": data},
    )


def _contexts(shots: int) -> list[tuple[Part, ...]]:
    """Return the instruction with each set of shots."""
    rows = load_vendored("mmlu_shots.jsonl", _FIELDS)
    return [
        (
            Part("instruction", INSTRUCTION),
            *(
                Part("shot", f"{_asked(row)} {_letter(row)}\n\n", unit=f"shot {i}")
                for i, row in enumerate(rows[start : start + shots], start=1)
            ),
        )
        for start in range(0, len(rows), SHOTS)
    ]


def _asked(row: Row) -> str:
    choices = zip(ascii_uppercase, row.values["choices"], strict=False)
    lines = [f"{letter}. {choice}" for letter, choice in choices]
    return "\n".join([row.values["question"], *lines, "Answer:"])


def _letter(row: Row) -> str:
    choices, answer = row.values["choices"], row.values["answer"]
    if not 2 <= len(choices) <= 10:
        raise row.wrong("choices", f"must be 2 to 10 texts, got {len(choices)}")
    letters = ascii_uppercase[: len(choices)]
    if isinstance(answer, int) and 0 <= answer < len(letters):
        return letters[answer]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return answer
    raise row.wrong(
        "answer", f"must be one of {', '.join(letters)} or 0 to {len(letters) - 1}, got {answer!r}"
    )
