"""Put a task to a model, with its full cache and under every cell, and mark the answers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.grid import Answer as Written
from pytest_kvguard.engine.grid import Cell, Grid, Outcome, Stopping
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.harness.encode import encode
from pytest_kvguard.harness.records import FULL, Answer, Counts, Fidelity, Held, Run
from pytest_kvguard.harness.trial import hopeless, unreadable
from pytest_kvguard.models import Loaded
from pytest_kvguard.progress import ProgressCallback, no_progress
from pytest_kvguard.tasks.base import Protocol, Sample, Task
from pytest_kvguard.tasks.units import MARKED

TRIAL = 20  # baseline answers after which a task far beyond the model is given up


@dataclass(frozen=True)
class Measured:
    """What a model made of a task."""

    baseline: Run
    runs: tuple[Run, ...]  # one for each cell, in their order; none when given up
    given_up: str | None = None  # why the cells were not run


class Bench:
    """A model on which tasks are measured."""

    def __init__(self, loaded: Loaded, *, memory: int | None = None) -> None:
        self.loaded = loaded
        self.engine = Engine(AttentionHook(loaded.model), memory=memory)

    def measure(
        self,
        task: Task,
        cells: Sequence[Cell],
        *,
        name: str | None = None,
        limit: int | None = None,
        protocol: Protocol | None = None,
        protect: Collection[str] = (),
        units: str = MARKED,
        progress: ProgressCallback = no_progress,
    ) -> Measured:
        """Answer the first ``limit`` samples of a task, with the full cache and under each cell.

        name: what reports call the task, such as ``word_problems(steps=2)``; its own name if None;
        protocol: when to compress, if not as the task says; protect: kinds of parts that every
        policy must keep; units: what a policy that keeps units keeps whole. Gives up after the
        first answers of a baseline that is hopeless.
        """
        samples = task.samples[:limit]
        if not samples:
            raise InvalidArgument(f"task {task.name!r} has no samples; give it some data")
        protocol = protocol or task.protocol
        ahead = protocol == "context"
        prompts = encode(
            task, samples, self.loaded.tokenizer, ahead=ahead, protect=protect, units=units
        )
        stopping = Stopping(task.max_new_tokens, self.loaded.eos, task.stop, self.loaded.decode)

        mark = _Marking(task, samples, stopping)
        # The fewer the better: then there is no chance level to stay clear of, only zero.
        chance = task.chance if task.higher_is_better else 0.0

        def look(answers: Mapping[int, Written]) -> int:
            marks, failure = mark(answers)
            on = failure is not None or hopeless(list(marks.values()), chance) is None
            return len(samples) if on else 0

        blank = Run(
            task=name or task.name,
            ability=task.ability,
            policy=FULL,
            params={},
            ratio=1.0,
            protocol=protocol,
            scores={},
            chance=task.chance,
            higher_is_better=task.higher_is_better,
        )
        if reason := unreadable([prompt.ids for prompt in prompts], self.loaded.tokenizer):
            return Measured(blank, (), reason)
        grid = self.engine.run(
            prompts, cells, stopping, first=TRIAL, look=look, progress=progress
        )
        blank = replace(blank, disagreements=grid.disagreements)
        record = _Recorder(samples, stopping, mark, grid, blank, units)
        baseline = record.run(grid.baseline)
        if baseline.error is None and (reason := hopeless(list(baseline.scores.values()), chance)):
            return Measured(baseline, (), reason)
        runs = tuple(record.cell(cell, grid.cells[i]) for i, cell in enumerate(cells))
        return Measured(baseline, runs)


@dataclass(frozen=True)
class _Marking:
    """Marks answers; a scorer is other people's code and fails the run it fails on, no other."""

    task: Task
    samples: Sequence[Sample]
    stopping: Stopping

    def __call__(self, answers: Mapping[int, Written]) -> tuple[dict[str, float], str | None]:
        """Return the marks by sample id, and what went wrong with the first that has none."""
        marks: dict[str, float] = {}
        for index in sorted(answers):
            sample, text = self.samples[index], self.stopping.text(answers[index].tokens)
            try:
                marks[sample.id] = self.task.scorer(text, sample)
            except Exception as problem:  # other people's code: its run fails alone
                why = f"{type(problem).__name__}: {problem}"
                return marks, f"the scorer failed on sample {sample.id} and {text[:60]!r}: {why}"
        return marks, None


@dataclass(frozen=True)
class _Recorder:
    """Turns outcomes of the engine into runs."""

    samples: Sequence[Sample]
    stopping: Stopping
    mark: _Marking
    grid: Grid
    blank: Run
    units: str

    def run(self, outcome: Outcome) -> Run:
        scores, failure = self.mark(outcome.answers)
        return replace(
            self.blank,
            scores=scores,
            error=failure,
            answers={
                self.samples[i].id: Answer(
                    text=self.stopping.text(answer.tokens),
                    tokens=len(answer.tokens),
                    stopped=self.stopping.ended(answer.tokens),
                )
                for i, answer in sorted(outcome.answers.items())
            },
            held=_held(outcome),
            read=fmean(outcome.read) if outcome.read else None,
            bytes_full=outcome.bytes_full,
            bytes_held=outcome.bytes_held,
            counts=Counts(self.grid.prefills, outcome.forwards, outcome.tokens, outcome.prefills),
            fidelity=_fidelity(outcome),
            seconds=outcome.seconds,
        )

    def cell(self, cell: Cell, outcome: Outcome) -> Run:
        run = self.run(outcome)
        error = run.error
        if outcome.problem is not None:
            index, why = outcome.problem
            error = f"sample {self.samples[index].id}: {why}"
        return replace(
            run,
            policy=cell.policy.name,
            params=dict(cell.policy.params),
            ratio=cell.ratio,
            saves=cell.policy.saves,
            units=self.units if cell.policy.keeps_units else None,
            evicted=outcome.evicted > 0,
            error=error,
        )


def _held(outcome: Outcome) -> Held | None:
    if not outcome.held:
        return None
    return Held(
        min=min(float(held.min()) for held in outcome.held),
        mean=sum(float(held.mean()) for held in outcome.held) / len(outcome.held),
        max=max(float(held.max()) for held in outcome.held),
    )


def _fidelity(outcome: Outcome) -> Fidelity | None:
    known = [
        (answer.kl, answer.agreement)
        for answer in outcome.answers.values()
        if answer.kl is not None and answer.agreement is not None
    ]
    if not known:
        return None
    return Fidelity(
        kl=sum(kl for kl, _ in known) / len(known),
        agreement=sum(agreement for _, agreement in known) / len(known),
    )
