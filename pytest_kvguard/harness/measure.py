"""Put a task to a model, with its full cache and under every cell, and mark the answers."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from statistics import fmean

from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.grid import Answer as Written
from pytest_kvguard.engine.grid import Cell, Grid, Outcome
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.harness.encode import contexts, encode
from pytest_kvguard.harness.records import FULL, Answer, Counts, Fidelity, Held, Run
from pytest_kvguard.harness.replies import Stopping, stopping
from pytest_kvguard.harness.trial import Futility, unreadable
from pytest_kvguard.models import Loaded
from pytest_kvguard.progress import ProgressCallback, no_progress
from pytest_kvguard.tasks.base import Protocol, Sample, Task
from pytest_kvguard.tasks.units import MARKED

CUT = (("truncated", "truncated"), ("looped", "cut off in a loop"))
"""Endings that are no end, in words."""


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
        policy must keep; units: what a policy that keeps units keeps whole. Gives up as soon as
        the answers of the full cache prove that the task is beyond the model.
        """
        samples = task.samples[:limit]
        if not samples:
            raise InvalidArgument(f"task {task.name!r} has no samples; give it some data")
        if twice := [id for id, count in Counter(s.id for s in samples).items() if count > 1]:
            raise InvalidArgument(
                f"task {task.name!r} has several samples called {twice[0]!r}; give each its own id"
            )
        protocol = protocol or task.protocol
        ahead = protocol == "context"
        prompts = encode(
            task, samples, self.loaded.tokenizer, ahead=ahead, protect=protect, units=units
        )
        until = stopping(
            task,
            [prompt.ids for prompt in prompts],
            self.loaded.tokenizer,
            self.loaded.eos,
            self.loaded.decode,
        )
        mark = _Marking(task, samples, until)
        # The fewer the better: then there is no chance level to stay clear of, only zero.
        futility = Futility(len(samples), task.chance if task.higher_is_better else 0.0)

        def look(answers: Mapping[int, Written]) -> int:
            marks, failure = mark(answers)
            found = list(marks.values())
            if failure is not None or fmean(found) >= futility.floor:
                return len(samples)  # to look again would change nothing
            return 0 if futility.reason(found) else len(found)

        blank = Run(
            task=name or task.name,
            ability=task.ability,
            policy=FULL,
            params={},
            ratio=1.0,
            protocol=protocol,
            scores={},
            clusters=contexts(samples, prompts),
            chance=task.chance,
            higher_is_better=task.higher_is_better,
        )
        if reason := unreadable([prompt.ids for prompt in prompts], self.loaded.tokenizer):
            return Measured(blank, (), reason)
        grid = self.engine.run(
            prompts, cells, until, first=futility.first_look, look=look, progress=progress
        )
        blank = replace(blank, disagreements=grid.disagreements, peak_bytes=grid.peak_bytes)
        record = _Recorder(samples, until, mark, grid, blank, units)
        baseline = record.run(grid.baseline)
        if baseline.error is None and (reason := futility.reason(list(baseline.scores.values()))):
            return Measured(baseline, (), reason + _cut_off(baseline))
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
            where = f"on sample {sample.id} and {text[:60]!r}"
            try:
                mark = self.task.scorer(text, sample)
            except Exception as problem:  # other people's code: its run fails alone
                return marks, f"the scorer failed {where}: {type(problem).__name__}: {problem}"
            if not isinstance(mark, Real) or not 0 <= mark <= 1:  # nan fails too
                return marks, f"the scorer gave {mark!r} {where}; a mark is a number in [0, 1]"
            marks[sample.id] = float(mark)
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
                self.samples[i].id: self._answer(answer.tokens)
                for i, answer in sorted(outcome.answers.items())
            },
            held=_held(outcome),
            read=fmean(outcome.read) if outcome.read else None,
            bytes_full=outcome.bytes_full,
            bytes_held=outcome.bytes_held,
            bytes_padding=outcome.bytes_padding,
            counts=Counts(self.grid.prefills, outcome.forwards, outcome.tokens, outcome.prefills),
            fidelity=_fidelity(outcome),
            seconds=outcome.seconds,
        )

    def _answer(self, tokens: Sequence[int]) -> Answer:
        reply = self.stopping.read(tokens)
        return Answer(
            text=reply.answer,
            tokens=len(tokens),
            stopped=reply.ending == "ended",
            looped=reply.ending == "looped",
            trace=reply.trace,
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


def _cut_off(baseline: Run) -> str:
    """Tell how many answers had no chance to come to their end; nothing if all had."""
    cut = [f"{baseline.endings[how]} were {text}" for how, text in CUT if baseline.endings[how]]
    in_trace = sum(bool(a.trace) and not a.text for a in baseline.answers.values())
    cut += [f"{in_trace} never got beyond their reasoning"] if in_trace else []
    return f" (of its {len(baseline.answers)} answers, {', '.join(cut)})" if cut else ""


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
