"""Word problems whose quantities are defined in the shots.

Each shot says what one container holds and works one step with it. The question names ``steps``
containers, so that the answer needs that many of the shots. All numbers stay below 100.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, islice
from random import Random

from pytest_kvguard.tasks.base import Part, Sample, Task
from pytest_kvguard.tasks.checks import check_count
from pytest_kvguard.tasks.procedural.exercises import (
    STOP,
    Exercise,
    Split,
    draw_samples,
    exercise,
    split_of,
)
from pytest_kvguard.tasks.procedural.words import CONTAINERS, GOODS

HOLDS = range(2, 10)
COUNTS = range(2, 6)
LARGEST_TOTAL = 99


@dataclass(frozen=True)
class Clause:
    """So many containers, each of which holds so many goods: the instance that is held out."""

    count: int
    container: str
    holds: int
    goods: str

    @property
    def split(self) -> Split:
        """Where this clause may be asked about."""
        return split_of(f"{self.count} {self.container} {self.holds} {self.goods}")

    @property
    def definition(self) -> str:
        """What a shot says: ``A crate holds 6 apples.``."""
        return f"A {self.container} holds {self.holds} {self.goods}."

    @property
    def amount(self) -> str:
        """What a question names: ``3 crates``."""
        return f"{self.count} {CONTAINERS[self.container]}"

    @property
    def product(self) -> int:
        """How many goods there are in all these containers."""
        return self.count * self.holds


def word_problems(*, n: int = 100, steps: int = 2, shots: int = 8, seed: int = 0) -> Task:
    """Return ``n`` problems of ``steps`` (1..4) steps after ``shots`` (steps..16) shots."""
    check_count("steps", steps, 1, 4)
    check_count("shots", shots, steps, 16)
    return Task(
        name="word_problems",
        ability="reasoning",
        samples=draw_samples(lambda rng: draw_problem(rng, steps, shots), n, seed),
        scorer=stated_answer_is_right,
        max_new_tokens=60 + 60 * steps,
        stop=(STOP,),
        chat=False,
        source="procedural",
        params={"steps": steps, "shots": shots, "seed": seed},
    )


def draw_problem(rng: Random, steps: int, shots: int) -> Exercise:
    """Draw one problem of the test split; the asked containers are anywhere among the shots."""
    while True:
        asked, defined = draw_clauses(rng, steps, shots, "test")
        if sum(clause.product for clause in asked) <= LARGEST_TOTAL:
            break
    parts = [shot_part(i, clause) for i, clause in enumerate(defined)]
    parts.append(Part("question", f"Q: {question(asked)}\nA:"))
    labels = (f"steps={steps}", f"shots={shots}")
    target = (str(sum(clause.product for clause in asked)),)
    return exercise("word_problems", parts, f" {worked(asked)}", target, labels)


def draw_clauses(
    rng: Random, asked: int, defined: int, split: Split
) -> tuple[list[Clause], list[Clause]]:
    """Draw what is asked, all of it of ``split``, and the shots that define it, all of ``train``.

    So no shot of a test problem asks for the count that its question asks for.
    """
    goods = rng.choice(GOODS)
    containers = rng.sample(sorted(CONTAINERS), len(CONTAINERS))
    askable = (_askable(one, goods, split) for one in containers)
    wanted = [rng.choice(options) for options in islice(filter(None, askable), asked)]
    named = {clause.container for clause in wanted}
    others = [one for one in containers if one not in named][: defined - asked]
    shots = [rng.choice(_as_shots(clause)) for clause in wanted]
    shots += [rng.choice(_askable(one, goods, "train")) for one in others]
    rng.shuffle(shots)
    return wanted, shots


def shot_part(index: int, clause: Clause) -> Part:
    """Return one worked example, a unit of its own."""
    text = f"Q: {clause.definition} {question([clause])}\nA: {worked([clause])}{STOP}"
    return Part("shot", text, unit=f"shot {index}")


def question(clauses: list[Clause]) -> str:
    """Return ``How many apples are in 2 crates, 3 boxes and 4 bags?``."""
    *others, last = [clause.amount for clause in clauses]
    amounts = f"{', '.join(others)} and {last}" if others else last
    return f"How many {clauses[0].goods} are in {amounts}?"


def worked(clauses: list[Clause]) -> str:
    """Return the chain of thought: each definition before its use, and a running total."""
    lines = []
    totals = accumulate(clause.product for clause in clauses)
    for i, (clause, total) in enumerate(zip(clauses, totals, strict=True)):
        step = f"{clause.amount}: a {clause.container} holds {clause.holds} {clause.goods}. "
        step += f"{clause.count} * {clause.holds} = {clause.product}"
        if i == 0:
            lines.append(f"{step} {clause.goods} in {clause.amount}.")
        else:
            sum_up = f"{total - clause.product} + {clause.product} = {total}"
            lines.append(f"{step}. {sum_up} {clause.goods} with {clause.amount}.")
    return f"{' '.join(lines)} The answer is {total}."


def stated_answer_is_right(completion: str, sample: Sample) -> float:
    """Mark 1 if the first ``answer is N`` is the target; an answer not stated is wrong."""
    return float(stated_answers(completion)[:1] == list(sample.target))


def stated_answers(text: str) -> list[str]:
    """Return every number that the text states as an answer."""
    return re.findall(r"answer is (\d+)", text)


@cache  # the same 1,600 tuples are drawn from over and over
def _askable(container: str, goods: str, split: Split) -> tuple[Clause, ...]:
    """Return the clauses of this container that belong to ``split`` and that a shot can define."""
    every = (Clause(count, container, holds, goods) for holds in HOLDS for count in COUNTS)
    return tuple(clause for clause in every if clause.split == split and _as_shots(clause))


def _as_shots(clause: Clause) -> list[Clause]:
    """Return the clauses that define the same and belong to ``train``."""
    every = (replace(clause, count=count) for count in COUNTS)
    return [clause for clause in every if clause.split == "train"]
