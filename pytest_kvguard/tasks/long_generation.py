"""Long generation: many word problems in one prompt, all answered in one completion.

Liu et al., 2024, LongGenBench, https://arxiv.org/abs/2410.04199. As there, the questions of the
examples come first and their answers after: a shot is two spans of one unit.

Differs from the paper: fewer questions, own words for the instruction, which is no system message
because some chat templates refuse one; answers are matched by number and not by place.
"""

from collections.abc import Sequence
from functools import partial

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.tasks import gsm8k
from pytest_kvguard.tasks.base import Part, Sample, Task
from pytest_kvguard.tasks.checks import check_count
from pytest_kvguard.tasks.scorers import numbered_answers

INSTRUCTION = (
    "Answer all the questions at the end, in order and step by step. Begin each answer with "
    "'Answer_' and the number of its question, and finish it with 'The answer is' and a number. "
    "Do not repeat the questions.\n\n"
)


def long_generation(
    *, questions: int = 4, shots: int = gsm8k.SHOTS, data: str | None = None
) -> Task:
    """Ask ``questions`` (1 to 100) word problems at once, after ``shots`` (0 to 8) examples.

    data: as for ``arithmetic``; what does not fill a last prompt is left out

    The mark is the share of the questions answered rightly.
    """
    check_count("questions", questions, 1, 100)
    check_count("shots", shots, 0, gsm8k.SHOTS)
    problems = gsm8k.problems(data)
    if len(problems) < questions:
        raise InvalidArgument(f"questions={questions} but {data} holds only {len(problems)}")
    context = (Part("instruction", INSTRUCTION), *_examples(gsm8k.worked_examples(shots)))
    groups = [
        problems[start : start + questions]
        for start in range(0, len(problems) - questions + 1, questions)
    ]
    return Task(
        name="long_generation",
        ability="long generation",
        samples=tuple(_sample(context, group, shots) for group in groups),
        scorer=partial(numbered_answers, first=shots + 1),
        max_new_tokens=160 * questions,
        stop=("\nQuestion_",),
        source=data or gsm8k.SOURCE,
        params={"questions": questions, "shots": shots, "data": data},
    )


def _examples(examples: Sequence[gsm8k.WorkedExample]) -> list[Part]:
    numbered = list(enumerate(examples, start=1))
    asked = [
        Part("shot", f"Question_{i}: {shot.question}\n\n", unit=f"shot {i}") for i, shot in numbered
    ]
    answered = [
        Part("shot", f"Answer_{i}: {shot.answer}\n\n", unit=f"shot {i}") for i, shot in numbered
    ]
    return [*asked, *answered]


def _sample(context: Sequence[Part], group: Sequence[gsm8k.Problem], shots: int) -> Sample:
    asked = [
        f"Question_{i}: {problem.question}\n\n" for i, problem in enumerate(group, start=shots + 1)
    ]
    return Sample(
        f"{len(group)}-from-{group[0].id}",
        (*context, Part("question", f"{''.join(asked)}Answers:")),
        target=tuple(problem.target for problem in group),
        labels=(f"questions={len(group)}", f"shots={shots}"),
    )
