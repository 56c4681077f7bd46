"""The loop: prefill a wave of prompts, let the full cache answer, then every cell.

Each context is prefilled once, whoever shares it. Each policy rates its positions once, whatever
the ratios. The answers of the full cache serve as drafts: a compressed row reads its draft in one
pass and writes on by itself only from where it disagrees. Rows of all cells and prompts go
through the model together, as many as memory allows.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from time import perf_counter
from typing import TypeVar

import torch

from pytest_kvguard.engine.cache.group import GroupFailed
from pytest_kvguard.engine.compress import Compressor
from pytest_kvguard.engine.generate import answer_in_full, write_on
from pytest_kvguard.engine.grid import Answer, Cell, Grid, Outcome, Prompt, Stopping
from pytest_kvguard.engine.memory import chunks, halving, keep_freed_memory, peak_on, room_on
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.own_prefill import OwnPrefills, prefills_alone
from pytest_kvguard.engine.prefill import Observe
from pytest_kvguard.engine.record import Meter, fail, record
from pytest_kvguard.engine.requests import Draft, HeldPrompt, Request, VerifiedRow
from pytest_kvguard.engine.selfcheck import check_faithful
from pytest_kvguard.engine.settings import Settings
from pytest_kvguard.engine.sizes import (
    answer_bytes,
    draft_bytes,
    one_layer_bytes,
    reading_bytes,
    writing_bytes,
)
from pytest_kvguard.engine.verify import read_in_full, verify
from pytest_kvguard.engine.waves import Wave, waves
from pytest_kvguard.progress import ProgressCallback, no_progress

Item = TypeVar("Item")

SHARE = 4  # prefills, references and rows exist at the same time, each a part of the memory

Look = Callable[[Mapping[int, Answer]], int]
"""Answers of the full cache by prompt -> after how many more to look again; 0: end the run."""


def look_no_more(answers: Mapping[int, Answer]) -> int:
    """Let all answers be given."""
    return sys.maxsize


class Engine:
    """Runs grids on one model.

    memory: bytes of caches and logits to hold at a time, by default what the device has free.
    """

    def __init__(
        self,
        hook: AttentionHook,
        *,
        memory: int | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.hook = hook
        self.memory = room_on(hook.device) if memory is None else memory
        self.settings = settings or Settings.on(hook.device)
        self._position_bytes: int | None = None  # once the model was checked
        self._answered: dict[object, list[int]] = {}  # what the full cache said, in tokens
        keep_freed_memory()

    @property
    def room(self) -> int:
        """Bytes of one kind of what is held at a time."""
        return self.memory // SHARE

    def run(
        self,
        prompts: Sequence[Prompt],
        cells: Sequence[Cell],
        stopping: Stopping,
        *,
        first: int = 24,
        look: Look = look_no_more,
        progress: ProgressCallback = no_progress,
    ) -> Grid:
        """Answer every prompt with the full cache and under every cell.

        After the first ``first`` answers of the full cache, ``look`` is given all there are. It
        returns after how many more it is asked again; 0 ends the run. ``progress`` is called after
        every pass of the model.
        """
        grid = Grid(Outcome(), {index: Outcome() for index in range(len(cells))})
        if not prompts:
            return grid
        if self._position_bytes is None:
            longest = max(prompts, key=lambda prompt: len(prompt.ids))
            self._position_bytes = check_faithful(self.hook, longest.ids)
        tokens, prefills = self.hook.tokens, self.hook.prefills

        def passed() -> None:
            progress(grid.progress(len(prompts), self.hook.tokens - tokens))

        def draft_size(held: HeldPrompt) -> int:
            tokens = grid.baseline.answers[held.index].tokens
            return draft_bytes(len(tokens), self.hook.vocabulary)

        with self.hook.open(passed):
            looks = _Looks(look, first)
            for wave in waves(prompts, self._position_bytes, self.room):
                if not self._baseline(wave, prompts, cells, grid, stopping, looks):
                    grid.abandoned = True
                    break
                held = [wave.held(index, prompts[index]) for index in wave.indices]
                for part in chunks(held, draft_size, self.room):
                    self._cells(part, cells, grid, stopping)
        own = sum(outcome.prefills for outcome in grid.cells.values())
        grid.prefills = self.hook.prefills - prefills - own
        grid.peak_bytes = peak_on(self.hook.device)
        return grid

    def _baseline(
        self,
        wave: Wave,
        prompts: Sequence[Prompt],
        cells: Sequence[Cell],
        grid: Grid,
        stopping: Stopping,
        looks: "_Looks",
    ) -> bool:
        """Prefill a wave and let the full cache answer; return whether to go on."""
        sharing = [cell.policy for cell in cells if not prefills_alone(cell.policy)]
        observe = Observe(
            window=max([policy.window for policy in sharing], default=1),
            sums=any(policy.needs_sums for policy in sharing),
        )

        def answer_size(held: HeldPrompt) -> int:
            return answer_bytes(held, stopping, self.hook.vocabulary)

        left = list(wave.indices)
        while left:
            some, left = left[: looks.wait], left[looks.wait :]
            wave.prefill(self.hook, [prompts[index] for index in some], observe, self.settings)
            held = [wave.held(index, prompts[index]) for index in some]
            for batch in chunks(held, answer_size, self.room):
                self._answer(batch, grid, stopping)
            if not looks.go_on(len(some), grid.baseline.answers):
                return False
        return True

    def _answer(self, held: Sequence[HeldPrompt], grid: Grid, stopping: Stopping) -> None:
        """Let the full cache answer; what it has answered before it repeats."""
        meter, outcome = perf_counter(), grid.baseline
        asked = [_question(one.prompt, stopping) for one in held]
        fresh: dict[int, Answer] = {}

        def work(some: Sequence[int]) -> None:
            rows = [held[at] for at in some]
            answers = answer_in_full(self.hook, rows, stopping, self.settings)
            fresh.update(zip(some, answers, strict=True))

        if unknown := [at for at, one in enumerate(asked) if one not in self._answered]:
            halving(unknown, work)
        for at, one in enumerate(held):
            answer = fresh.get(at) or Answer(list(self._answered[asked[at]]))
            self._answered[asked[at]] = answer.tokens
            record(outcome, one, one.full, answer)
        outcome.forwards += max((answer.forwards for answer in fresh.values()), default=0)
        outcome.seconds += perf_counter() - meter

    def _cells(
        self, part: Sequence[HeldPrompt], cells: Sequence[Cell], grid: Grid, stopping: Stopping
    ) -> None:
        """Answer some prompts under every cell.

        What is left to write is put off until it fills the room: a pass of the model costs little
        more for many rows than for few.
        """
        if not cells:
            return
        drafts: list[Draft] = []

        def read(some: Sequence[HeldPrompt]) -> None:
            answers = [grid.baseline.answers[one.index].tokens for one in some]
            drafts.extend(read_in_full(self.hook, some, answers))

        for some in chunks(part, one_layer_bytes, self.room):
            halving(some, read)
        grid.disagreements += sum(draft.choices != draft.tokens for draft in drafts)
        own = OwnPrefills(self.hook)
        requests = (
            request
            for held, draft in zip(part, drafts, strict=True)
            for request in self._select(held, draft, cells, grid, own)
        )
        waiting: list[VerifiedRow] = []
        for batch in chunks(requests, reading_bytes, self.room):
            waiting += self._verify(batch, grid, stopping)
            if writing_bytes(waiting, stopping) > self.room:
                self._write(waiting, grid, stopping)
                waiting = []
        self._write(waiting, grid, stopping)

    def _select(
        self,
        held: HeldPrompt,
        draft: Draft,
        cells: Sequence[Cell],
        grid: Grid,
        own: OwnPrefills,
    ) -> Iterator[Request]:
        """Choose what each cell keeps of a prompt."""
        compressor = Compressor(self.hook, held, own)
        for index, cell in enumerate(cells):
            if grid.cells[index].problem is not None:
                continue
            before = self.hook.prefills
            try:
                request = compressor.request(draft, index, cell)
            except Exception as problem:  # other people's code: its cell fails alone
                fail(grid, [(index, held.index)], problem)
                continue
            finally:
                grid.cells[index].prefills += self.hook.prefills - before
            yield request

    def _verify(
        self, requests: Sequence[Request], grid: Grid, stopping: Stopping
    ) -> list[VerifiedRow]:
        """Let rows read their drafts; return those that are not at their end."""
        going: list[VerifiedRow] = []

        def work(some: Sequence[Request]) -> None:
            meter = Meter()
            rows = verify(self.hook, some, stopping, self.settings)
            meter.note(grid, [(row.request.index, row.answer, 0, 0) for row in rows])
            for row in rows:
                outcome = grid.cells[row.request.index]
                outcome.evicted += row.evicted
                outcome.read += [] if row.read is None else [row.read]
                if not stopping.over(row.answer.tokens):
                    going.append(row)
                else:
                    self._record(row, row.answer, grid)

        self._isolating(requests, lambda request: request, grid, work)
        return going

    def _write(self, rows: Sequence[VerifiedRow], grid: Grid, stopping: Stopping) -> None:
        """Let unfinished rows write on, all together."""

        def work(some: Sequence[VerifiedRow]) -> None:
            meter = Meter()
            answers = write_on(self.hook, some, stopping, self.settings)
            pairs = list(zip(some, answers, strict=True))
            meter.note(
                grid,
                [(r.request.index, a, r.answer.forwards, r.answer.fed) for r, a in pairs],
            )
            for row, answer in pairs:
                self._record(row, answer, grid)

        if rows:
            self._isolating(rows, lambda row: row.request, grid, work)

    def _isolating(
        self,
        items: Sequence[Item],
        request_of: Callable[[Item], Request],
        grid: Grid,
        work: Callable[[Sequence[Item]], None],
    ) -> None:
        """Work on rows of many cells; where one's own code fails, go on without that cell.

        Where memory does not hold them, they are halved; a single row that it does not hold fails
        its cell.
        """
        left = list(items)

        def try_work(some: Sequence[Item]) -> None:
            work(some)
            for item in some:
                left.remove(item)

        while left:
            try:
                halving(list(left), try_work)
            except GroupFailed as failure:
                lost = [item for item in left if request_of(item).index in failure.cells]
                problem: BaseException = failure.__cause__ or failure
            except torch.OutOfMemoryError as failure:
                lost, problem = left[:1], failure
            else:
                return
            requests = [request_of(item) for item in lost]
            fail(grid, [(request.index, request.held.index) for request in requests], problem)
            left = [item for item in left if item not in lost]

    def _record(self, row: VerifiedRow, answer: Answer, grid: Grid) -> None:
        request = row.request
        record(grid.cells[request.index], request.held, request.kept, answer, row.stored)


@dataclass
class _Looks:
    """When the answers of the full cache are looked at."""

    look: Look
    wait: int  # answers until the next look

    def go_on(self, more: int, answers: Mapping[int, Answer]) -> bool:
        """Count ``more`` answers, look if it is time, and return whether to go on."""
        self.wait -= more
        if self.wait <= 0:
            self.wait = self.look(answers)
        return self.wait > 0


def _question(prompt: Prompt, stopping: Stopping) -> object:
    """Return all that the full cache's answer depends on, but for the model."""
    rules = (getattr(stopping, one.name) for one in fields(stopping) if one.name != "decode")
    return prompt.ids, prompt.fed, type(stopping), *rules
