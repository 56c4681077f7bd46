"""Answers of jobs: drafts are read side by side, and rows that disagree write on side by side."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor

from pytest_kvguard.kv.borrowing import borrowing
from pytest_kvguard.kv.chunks import chunks
from pytest_kvguard.kv.compress import Kept
from pytest_kvguard.kv.decode import Answer, Stopping, greedy, judge, score_draft
from pytest_kvguard.kv.grid import Cell, Grid
from pytest_kvguard.kv.jobs import Job, cache_bytes, fail, kept_of, record, row_bytes
from pytest_kvguard.kv.layers import layers_of
from pytest_kvguard.kv.reading import read_shares
from pytest_kvguard.kv.rope import Rotation
from pytest_kvguard.kv.rows import GROWTH, Rows
from pytest_kvguard.kv.seam import Seam
from pytest_kvguard.kv.sharing import shareable
from pytest_kvguard.policies.base import Policy


@dataclass
class Begun:
    """A job whose draft was read."""

    job: Job
    answer: Answer  # so far
    counts: Tensor  # (layers, Hkv) positions it started from
    size: int  # bytes of these
    start: Kept | None = None  # what to start over from, where that is needed


@dataclass(frozen=True)
class Unfinished:
    """Rows of one batch that write on by themselves."""

    begun: list[Begun]
    rows: Rows | None  # as they agreed with their drafts; None: they start over


class Answering:
    """Answers jobs under the cells of a grid; ``room``: bytes of rows side by side."""

    def __init__(
        self,
        seam: Seam,
        cells: Sequence[Cell],
        grid: Grid,
        stopping: Stopping,
        room: int,
        rotation_for: Callable[[Policy], Rotation | None],
    ) -> None:
        self.seam, self.cells, self.grid, self.stopping = seam, cells, grid, stopping
        self.room, self.rotation_for = room, rotation_for
        self.growth = min(GROWTH, stopping.most)  # slots for new tokens at first

    def run(self, jobs: Iterable[Job]) -> None:
        """Answer jobs whose rows decode alike.

        What is left to write is put off until it fills the room: a pass of the model costs little
        more for many rows than for few.
        """
        waiting: list[Unfinished] = []
        for batch in chunks(jobs, lambda job: row_bytes(job, self._borrows(job)), self.room):
            with self._failing(batch):
                waiting += self._read(batch)
            if self._going_on(waiting) > self.room:
                self._write(waiting)
                waiting = []
        if waiting:
            self._write(waiting)

    def _borrows(self, job: Job) -> bool:
        """Whether what a row keeps is looked at where it lies, among what others keep."""
        cell = self.cells[job.cell]
        return cell.grows and job.own is None and not cell.policy.rerotate

    def _going_on(self, waiting: Sequence[Unfinished]) -> int:
        """Bytes that rows take when they write on; those of one prompt may share its prefill."""
        rows: defaultdict[int, list[Job]] = defaultdict(list)
        for part in waiting:
            for one in part.begun:
                rows[one.job.held.index].append(one.job)
        total = 0
        for jobs in rows.values():
            held = jobs[0].held
            copied = sum(job.most for job in jobs if self._borrows(job))
            share = shareable(held.prefill.layers[0].keys) and copied >= held.prompt.fed
            total += sum(
                cache_bytes(job, share and self._borrows(job), self.growth) for job in jobs
            )
        return total

    def _read(self, batch: Sequence[Job]) -> Iterator[Unfinished]:
        """Read the drafts of a batch; yield the rows that are not at their end."""
        started = perf_counter()
        rotations = [self.rotation_for(self.cells[job.cell].policy) for job in batch]
        kept = [kept_of(job, turn) for job, turn in zip(batch, rotations, strict=True)]
        make = layers_of(batch, self.cells, self.stopping.most, rotations[0])
        # Most rows make this pass and no other, so copies of all they keep would be for nothing.
        rows = Rows(kept, borrowing if self.cells[batch[0].cell].grows else make)
        held = [(one.length, one.held, size) for one, size in zip(kept, rows.bytes, strict=True)]
        tails = [job.held.prompt.tail for job in batch]
        logits = score_draft(self.seam, rows, tails, [job.draft.tokens for job in batch])
        begun = [
            Begun(job, judge(own, job.draft, len(tail)), counts, size)
            for job, own, tail, (_, counts, size) in zip(batch, logits, tails, held, strict=True)
        ]
        self._note_reading(begun, rows)
        self._note_cost(begun, [(0, 0)] * len(begun), started)
        going = [i for i, one in enumerate(begun) if not self.stopping.over(one.answer.tokens)]
        self._record(one for i, one in enumerate(begun) if i not in going)
        unfinished = [begun[i] for i in going]
        if going and rows.rewindable:
            rows.take(going)
            agreed = [len(tails[i]) + len(begun[i].answer.tokens) - 1 for i in going]
            rows.rewind([held[i][0] + n for i, n in zip(going, agreed, strict=True)])
            yield Unfinished(unfinished, rows)
        elif going:  # what was evicted or encoded while reading the draft is gone
            for i in going:
                begun[i].start = kept[i]
            yield Unfinished(unfinished, None)

    def _write(self, waiting: Sequence[Unfinished]) -> None:
        """Let unfinished rows write on, all side by side."""
        begun = [one for part in waiting for one in part.begun]
        with self._failing([one.job for one in begun]):
            started = perf_counter()
            before = [(one.answer.forwards, one.answer.fed) for one in begun]
            rows, pending = self._rows(begun, [part.rows for part in waiting])
            greedy(self.seam, rows, pending, [one.answer for one in begun], self.stopping)
            self._note_cost(begun, before, started)
            self._record(begun)

    def _rows(
        self, begun: Sequence[Begun], parts: Sequence[Rows | None]
    ) -> tuple[Rows, list[list[int]]]:
        """Return unfinished rows as one, and what each is fed next."""
        agreed = [rows for rows in parts if rows is not None]
        if agreed:
            rows, *others = agreed
            rows.join(others)
            rows.own(self.growth)
            return rows, [one.answer.tokens[-1:] for one in begun]
        jobs = [one.job for one in begun]
        rotation = self.rotation_for(self.cells[jobs[0].cell].policy)
        make = layers_of(jobs, self.cells, self.stopping.most, rotation)
        rows = Rows([one.start for one in begun if one.start is not None], make)
        return rows, [[*one.job.held.prompt.tail, *one.answer.tokens] for one in begun]

    def _note_reading(self, begun: Sequence[Begun], rows: Rows) -> None:
        """Note what reading the drafts evicted, and how much of what was held was read."""
        for one, evicted in zip(begun, rows.evicted, strict=True):
            self.grid.cells[one.job.cell].evicted += evicted
        for one, share in zip(begun, read_shares(list(rows.layers.values())) or (), strict=False):
            self.grid.cells[one.job.cell].read.append(share)

    def _note_cost(
        self, begun: Sequence[Begun], before: Sequence[tuple[int, int]], started: float
    ) -> None:
        """Share out what was spent since ``started``; before: forwards, tokens of each by then."""
        answers = [one.answer for one in begun]
        spent = [(a.forwards - n, a.fed - fed) for a, (n, fed) in zip(answers, before, strict=True)]
        second = (perf_counter() - started) / sum(fed for _, fed in spent)
        for cell in {one.job.cell for one in begun}:
            mine = [cost for one, cost in zip(begun, spent, strict=True) if one.job.cell == cell]
            self.grid.cells[cell].forwards += max(forwards for forwards, _ in mine)
            self.grid.cells[cell].seconds += second * sum(fed for _, fed in mine)

    def _record(self, begun: Iterable[Begun]) -> None:
        for one in begun:
            outcome = self.grid.cells[one.job.cell]
            record(outcome, one.job.held, one.counts, one.answer, one.size)

    @contextmanager
    def _failing(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Let what goes wrong in a block be the failure of these jobs' cells alone."""
        try:
            yield
        except Exception as problem:  # other people's code
            for job in jobs:
                fail(self.grid.cells[job.cell], job.held, problem)
