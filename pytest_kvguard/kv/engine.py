"""One prefill, every cell: answers of many prompts under many policies and ratios.

Each context is prefilled once, whoever shares it. Each policy rates its positions once, whatever
the ratios. The answers of the full cache serve as drafts: a compressed row reads its draft in one
pass and writes on by itself only from where it disagrees. Rows of all cells and prompts go
through the model together, as many as memory allows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from pytest_kvguard.kv.chunks import chunks
from pytest_kvguard.kv.compress import Kept, importances, keep, keep_all, keep_masks
from pytest_kvguard.kv.decode import Answer, Stopping, greedy, judge, score_draft
from pytest_kvguard.kv.evicting import Decoding, evicting
from pytest_kvguard.kv.grid import Cell, Grid, Outcome, Prompt
from pytest_kvguard.kv.prefill import Observe, Prefill, prefill
from pytest_kvguard.kv.rope import Rotation, find_rotation
from pytest_kvguard.kv.rows import GROWTH, GrowingLayer, LayerFactory, Rows
from pytest_kvguard.kv.seam import Seam
from pytest_kvguard.kv.selfcheck import check_faithful
from pytest_kvguard.policies.base import LayerState, Policy

LOGIT_BYTES = 12  # a float32 logit, its log-softmax, and the reference's
SHARE = 4  # prefills, references and rows exist at the same time, each a part of the memory


@dataclass(frozen=True)
class _Held:
    """A prompt with its prefill."""

    index: int
    prompt: Prompt
    prefill: Prefill

    @property
    def full(self) -> Kept:
        """Everything before what is fed again."""
        return keep_all(self.prefill, self.prompt.fed)


@dataclass(frozen=True)
class _Draft:
    """A prompt with the full cache's answer and the logits that decided it."""

    held: _Held
    tokens: list[int]
    logits: Tensor  # (len(tokens), V)


@dataclass(frozen=True)
class _Job:
    """A row to come: one prompt under one cell."""

    draft: _Draft
    cell: int
    masks: list[Tensor]
    budgets: list[int]


class Engine:
    """Runs grids on one model. ``memory``: bytes of caches and logits to hold at a time."""

    def __init__(self, seam: Seam, *, memory: int = 2**30) -> None:
        self.seam = seam
        self.memory = memory
        self._rotation: Rotation | None = None
        self._faithful = False

    def run(
        self,
        prompts: Sequence[Prompt],
        cells: Sequence[Cell],
        stopping: Stopping,
        *,
        first: int = 24,
        go_on: Callable[[Mapping[int, Answer]], bool] = lambda answers: True,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Grid:
        """Answer every prompt with the full cache and under every cell.

        After the first ``first`` answers of the full cache, ``go_on`` may end the run.
        ``progress`` hears answers done and in all.
        """
        self._check(prompts)
        grid = Grid(Outcome(), {index: Outcome() for index in range(len(cells))})
        total = len(prompts) * (1 + len(cells))
        done = 0
        waiting: list[_Held] = []  # answered by the full cache, not yet under the cells
        with self.seam.open():
            for wave, full in self._waves(prompts, cells, grid, first):
                on_trial = len(grid.baseline.answers) < first
                self._baseline(wave, grid, stopping)
                if on_trial and not go_on(grid.baseline.answers):
                    grid.abandoned = True
                    break
                waiting += wave
                if not full:
                    continue
                for part in chunks(waiting, self._draft_bytes(grid), self.memory // SHARE):
                    self._cells(part, cells, grid, stopping)
                    done += len(part) * (1 + len(cells))
                    progress(done, total)
                waiting = []
        return grid

    def _check(self, prompts: Sequence[Prompt]) -> None:
        """See once that the model answers through us as it does by itself."""
        if not self._faithful and prompts:
            check_faithful(self.seam, max(prompts, key=lambda prompt: len(prompt.ids)).ids)
            self._faithful = True

    def _waves(
        self, prompts: Sequence[Prompt], cells: Sequence[Cell], grid: Grid, first: int
    ) -> Iterator[tuple[list[_Held], bool]]:
        """Prefill the prompts, those of a context together.

        Yields some at a time, and whether memory holds no more: then all that were yielded since
        the last time must be let go of.
        """
        observe = Observe(
            window=max([cell.policy.window for cell in cells], default=1),
            sums=any(cell.policy.needs_sums for cell in cells),
        )
        wave: list[_Held] = []
        used, most = 0, first
        for indices in _by_context(prompts):
            shared = None
            if len(indices) > 1:
                start = prompts[indices[0]]
                shared = prefill(self.seam, start.ids[: start.context], observe)
            grid.prefills += 1 if shared else len(indices)
            for index in indices:
                prompt = prompts[index]
                ids = prompt.ids[: prompt.compressed]
                held = shared
                if held is None or len(held.ids) < len(ids):
                    held = prefill(self.seam, ids, observe, after=shared)
                wave.append(_Held(index, prompt, held))
                used += wave[-1].full.bytes
                full = used > self.memory // SHARE
                if full or len(wave) >= most:
                    yield wave, full
                    wave, most = [], len(prompts)
                    used = 0 if full else used
        yield wave, True

    def _baseline(self, wave: Sequence[_Held], grid: Grid, stopping: Stopping) -> None:
        """Let the full cache answer a wave of prompts."""
        for batch in chunks(wave, lambda held: _grown(held, stopping.most), self.memory // SHARE):
            started = perf_counter()
            answers = [Answer() for _ in batch]
            full = [held.full for held in batch]
            greedy(self.seam, Rows(full), [h.prompt.tail for h in batch], answers, stopping)
            outcome = grid.baseline
            outcome.forwards += max(answer.forwards for answer in answers)
            for held, kept, answer in zip(batch, full, answers, strict=True):
                _record(outcome, held, kept, kept, answer)
            outcome.seconds += perf_counter() - started

    def _draft_bytes(self, grid: Grid) -> Callable[[_Held], int]:
        """Tell what a prompt's draft logits take, in bytes."""
        vocabulary = self.seam.vocabulary

        def size(held: _Held) -> int:
            return len(grid.baseline.answers[held.index].tokens) * vocabulary * LOGIT_BYTES

        return size

    def _cells(
        self, part: Sequence[_Held], cells: Sequence[Cell], grid: Grid, stopping: Stopping
    ) -> None:
        """Answer some prompts under every cell."""
        if not cells:
            return
        tokens = [grid.baseline.answers[held.index].tokens for held in part]
        rows = Rows([held.full for held in part])
        logits = score_draft(self.seam, rows, [held.prompt.tail for held in part], tokens)
        drafts = [_Draft(*found) for found in zip(part, tokens, logits, strict=True)]
        grid.disagreements += sum(
            draft.logits.argmax(dim=-1).tolist() != draft.tokens for draft in drafts
        )
        for together in _decoding_alike(cells):
            jobs = [job for d in drafts for job in _select(d, together, cells, grid)]
            for batch in chunks(jobs, _row_bytes, self.memory // SHARE):
                try:
                    self._answer(batch, cells, grid, stopping)
                except Exception as problem:  # other people's code: its cells fail alone
                    for job in batch:
                        _fail(grid.cells[job.cell], job.draft.held, problem)

    def _answer(
        self, batch: Sequence[_Job], cells: Sequence[Cell], grid: Grid, stopping: Stopping
    ) -> None:
        """Answer one batch of rows: read the drafts, then write on where they are not shared."""
        started = perf_counter()
        rotations = [self._rotation_for(cells[job.cell].policy) for job in batch]
        kept = [_kept(job, turn) for job, turn in zip(batch, rotations, strict=True)]
        tails = [job.draft.held.prompt.tail for job in batch]
        make = self._layers(batch, cells, stopping)
        rows = Rows(kept, make)
        logits = score_draft(self.seam, rows, tails, [job.draft.tokens for job in batch])
        evicted = rows.evicted
        answers = [
            judge(own, job.draft.logits, job.draft.tokens, len(tail))
            for own, job, tail in zip(logits, batch, tails, strict=True)
        ]
        going = [i for i, answer in enumerate(answers) if not stopping.over(answer.tokens)]
        if going and cells[batch[0].cell].decode is None:
            rows.take(going)
            agreed = [len(tails[i]) + len(answers[i].tokens) - 1 for i in going]
            rows.rewind([kept[i].length + n for i, n in zip(going, agreed, strict=True)])
            pending: list[list[int]] = [answers[i].tokens[-1:] for i in going]
            greedy(self.seam, rows, pending, [answers[i] for i in going], stopping)
        elif going:  # what was evicted while reading the draft is gone: start over
            make = self._layers([batch[i] for i in going], cells, stopping)
            rows = Rows([kept[i] for i in going], make)
            pending = [[*tails[i], *answers[i].tokens] for i in going]
            greedy(self.seam, rows, pending, [answers[i] for i in going], stopping)
        spent = (perf_counter() - started) / sum(answer.fed for answer in answers)
        for cell in {job.cell for job in batch}:
            mine = [i for i, job in enumerate(batch) if job.cell == cell]
            grid.cells[cell].forwards += max(answers[i].forwards for i in mine)
            grid.cells[cell].seconds += spent * sum(answers[i].fed for i in mine)
            for i in mine:
                held = batch[i].draft.held
                _record(grid.cells[cell], held, held.full, kept[i], answers[i])
            grid.cells[cell].evicted += sum(evicted[i] for i in mine)

    def _rotation_for(self, policy: Policy) -> Rotation | None:
        if not policy.rerotate:
            return None
        if self._rotation is None:
            self._rotation = find_rotation(self.seam)
        return self._rotation

    def _layers(
        self, batch: Sequence[_Job], cells: Sequence[Cell], stopping: Stopping
    ) -> LayerFactory:
        """Choose how the layers of a batch decode; all its rows decode alike."""
        cell = cells[batch[0].cell]
        if cell.decode is None:
            return GrowingLayer
        slots = cell.decode.slots
        prompts = [job.draft.held.prompt for job in batch]
        ratios = [cells[job.cell].decode_ratio for job in batch]
        device = self.seam.device
        return evicting(
            Decoding(
                eviction=cell.decode,
                ratio=torch.tensor(ratios, dtype=torch.float64, device=device),
                prompt_length=torch.tensor([len(p.ids) for p in prompts], device=device),
                fresh=torch.tensor([p.compressed for p in prompts], device=device),
                slots=max(
                    slots(max(job.budgets), len(p.tail) + stopping.most, ratio)
                    for job, p, ratio in zip(batch, prompts, ratios, strict=True)
                ),
                rotation=self._rotation_for(cell.policy),
            )
        )


def _by_context(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Group the indices of prompts that begin with the same context, by first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt.ids[: prompt.context] or (-1 - index,), []).append(index)
    return list(groups.values())


def _decoding_alike(cells: Sequence[Cell]) -> list[list[int]]:
    """Group the indices of cells whose rows can be decoded side by side."""
    groups: dict[int, list[int]] = {}
    for index, cell in enumerate(cells):
        key = id(cell.policy) if cell.decode else 0
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _select(
    draft: _Draft, together: Sequence[int], cells: Sequence[Cell], grid: Grid
) -> Iterator[_Job]:
    """Choose what each cell keeps of a prompt; importance is rated once a policy."""
    held = draft.held
    rated: dict[int, tuple[list[Tensor], tuple[LayerState, ...]]] = {}
    for index in together:
        cell, outcome = cells[index], grid.cells[index]
        if outcome.problem is not None:
            continue
        try:
            if id(cell.policy) not in rated:
                mask = held.prompt.protection(cell.policy, held.prefill.layers[0].keys.device)
                states = held.prefill.states(held.prompt.units, mask)
                rated[id(cell.policy)] = importances(cell.policy, states), states
            ratings, states = rated[id(cell.policy)]
            masks = keep_masks(cell.policy, ratings, states, cell.ratio)
            budgets = [cell.policy.budget(state, cell.ratio) for state in states]
        except Exception as problem:  # other people's code: its cell fails alone
            _fail(outcome, held, problem)
            continue
        yield _Job(draft, index, masks, budgets)


def _fail(outcome: Outcome, held: _Held, problem: Exception) -> None:
    if outcome.problem is None:
        outcome.problem = held.index, f"{type(problem).__name__}: {problem}"


def _grown(held: _Held, new: int) -> int:
    """Bytes of a full row with ``new`` generated tokens."""
    return held.full.bytes * (held.prompt.compressed + new) // max(1, held.prompt.fed)


def _row_bytes(job: _Job) -> int:
    """Bytes a row takes: what is held, what its draft adds, and the draft's logits."""
    prompt = job.draft.held.prompt
    tokens = max(job.budgets) + len(prompt.tail) + len(job.draft.tokens) + GROWTH
    caches = job.draft.held.full.bytes * tokens // max(1, prompt.fed)
    return caches + job.draft.logits.numel() * LOGIT_BYTES


def _kept(job: _Job, rotation: Rotation | None) -> Kept:
    held = job.draft.held
    return keep(held.prefill, job.masks, job.budgets, held.prompt.fed, rotation)


def _record(outcome: Outcome, held: _Held, full: Kept, kept: Kept, answer: Answer) -> None:
    again = held.prompt.compressed - held.prompt.fed  # tokens of the prompt that were fed again
    outcome.answers[held.index] = answer
    outcome.held.append((kept.held.cpu().double() + again) / held.prompt.compressed)
    outcome.bytes_full += full.bytes
    outcome.bytes_held += kept.bytes
    outcome.tokens += answer.fed
