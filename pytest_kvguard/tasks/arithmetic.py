"""Arithmetic: GSM8K word problems, solved step by step after worked examples."""

from pytest_kvguard.tasks import gsm8k
from pytest_kvguard.tasks.base import Part, Sample, Task
from pytest_kvguard.tasks.checks import check_count
from pytest_kvguard.tasks.scorers import last_number


def arithmetic(*, shots: int = gsm8k.SHOTS, data: str | None = None) -> Task:
    """Ask word problems after ``shots`` (0 to 8) worked examples, each of them a unit.

    data: a file of JSON lines with ``question`` and ``answer``, or a hub data set such as
        ``openai/gsm8k``, whose test split is read; by default 100 of its problems

    The mark is whether the number the completion answers with is right, as `last_number` reads it.
    """
    check_count("shots", shots, 0, gsm8k.SHOTS)
    examples = tuple(
        Part("shot", f"Q: {shot.question}\nA: {shot.answer}\n\n", unit=f"shot {i}")
        for i, shot in enumerate(gsm8k.worked_examples(shots), start=1)
    )
    samples = tuple(
        Sample(
            problem.id,
            (*examples, Part("question", f"Q: {problem.question}\nA:")),
            target=(problem.target,),
            labels=(f"shots={shots}",),
        )
        for problem in gsm8k.problems(data)
    )
    return Task(
        name="arithmetic",
        ability="arithmetic",
        samples=samples,
        scorer=last_number,
        max_new_tokens=256,
        stop=("Q:",),
        source=data or gsm8k.SOURCE,
        params={"shots": shots, "data": data},
    )
