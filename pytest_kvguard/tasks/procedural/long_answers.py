"""Many questions in one prompt, answered in one go; each needs a shot of its own.

After the long generation of KVFundaBench (Liu et al., 2025, https://arxiv.org/abs/2502.01941).
"""

import re
from random import Random

from pytest_kvguard.tasks.base import Part, Sample, Task
from pytest_kvguard.tasks.checks import check_count
from pytest_kvguard.tasks.procedural.exercises import (
    STOP,
    Exercise,
    draw_samples,
    exercise,
)
from pytest_kvguard.tasks.procedural.word_problems import (
    Clause,
    draw_clauses,
    shot_part,
    stated_answers,
    worked,
)


def long_answers(*, n: int = 100, questions: int = 8, shots: int = 12, seed: int = 0) -> Task:
    """Return ``n`` prompts of ``questions`` (1..12) questions over ``shots`` (questions..16)."""
    check_count("questions", questions, 1, 12)
    check_count("shots", shots, questions, 16)
    return Task(
        name="long_answers",
        ability="long generation",
        samples=draw_samples(lambda rng: draw_list(rng, questions, shots), n, seed),
        scorer=share_of_right_answers,
        max_new_tokens=40 * questions + 20,  # an answer takes about 33
        stop=(STOP,),
        chat=False,
        source="procedural",
        params={"questions": questions, "shots": shots, "seed": seed},
    )


def draw_list(rng: Random, questions: int, shots: int) -> Exercise:
    """Draw one list of questions of the test split."""
    asked, defined = draw_clauses(rng, questions, shots, "test")
    parts = [shot_part(i, clause) for i, clause in enumerate(defined)]
    parts.append(Part("question", question_list(asked)))
    target = tuple(str(clause.product) for clause in asked)
    labels = (f"questions={questions}", f"shots={shots}")
    return exercise("long_answers", parts, answer_list(asked), target, labels)


def question_list(clauses: list[Clause]) -> str:
    """Return the numbered questions, up to and with ``A:``."""
    lines = [f"{i}. {clause.amount}" for i, clause in enumerate(clauses, start=1)]
    return f"Q: How many {clauses[0].goods} are in each of these?\n" + "\n".join(lines) + "\nA:"


def answer_list(clauses: list[Clause]) -> str:
    """Return the numbered answers, each with its chain of thought, a line each.

    A line ends with what it was about, so that the next question is found where that one stands.
    """
    return "".join(
        f"\n{i}. {worked([clause]).removesuffix('.')} in {clause.amount}."
        for i, clause in enumerate(clauses, start=1)
    )


def share_of_right_answers(completion: str, sample: Sample) -> float:
    """Return the share of questions answered rightly, once, in a line with their own number."""
    stated: dict[int, list[str]] = {}
    for number, line in re.findall(r"^\s*(\d+)[.)](.*)$", completion, flags=re.MULTILINE):
        stated.setdefault(int(number), []).extend(stated_answers(line))
    right = sum(stated.get(i) == [target] for i, target in enumerate(sample.target, start=1))
    return right / len(sample.target)
