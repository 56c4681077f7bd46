"""One prefill, every cell: answers of many prompts under many policies and ratios.

Each context is prefilled once, whoever shares it. Each policy rates its positions once, whatever
the ratios. The answers of the full cache serve as drafts: a compressed row reads its draft in one
pass and writes on by itself only from where it disagrees. Rows of all cells and prompts go
through the model together, as many as memory allows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter

from torch import Tensor

from pytest_kvguard.kv.answering import Answering
from pytest_kvguard.kv.chunks import chunks
from pytest_kvguard.kv.compress import importances, keep_masks
from pytest_kvguard.kv.decode import Answer, Draft, Stopping, greedy, score_draft
from pytest_kvguard.kv.grid import Cell, Grid, Outcome, Prompt
from pytest_kvguard.kv.heap import keep_freed_memory
from pytest_kvguard.kv.jobs import (
    LOGIT_BYTES,
    HeldPrompt,
    Job,
    Question,
    by_context,
    fail,
    grown,
    question,
    record,
)
from pytest_kvguard.kv.layers import decoding_alike
from pytest_kvguard.kv.own import OwnPrefills, prefills_alone
from pytest_kvguard.kv.prefill import Observe, prefill
from pytest_kvguard.kv.rope import Rotation, find_rotation
from pytest_kvguard.kv.rows import Rows
from pytest_kvguard.kv.seam import Seam
from pytest_kvguard.kv.selfcheck import check_faithful
from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.progress import Hear, nobody

SHARE = 4  # prefills, references and rows exist at the same time, each a part of the memory


class Engine:
    """Runs grids on one model. ``memory``: bytes of caches and logits to hold at a time."""

    def __init__(self, seam: Seam, *, memory: int = 2**30) -> None:
        self.seam = seam
        self.memory = memory
        self._rotation: Rotation | None = None
        self._faithful = False
        self._answered: dict[Question, list[int]] = {}  # what the full cache said, in tokens
        keep_freed_memory()

    def run(
        self,
        prompts: Sequence[Prompt],
        cells: Sequence[Cell],
        stopping: Stopping,
        *,
        first: int = 24,
        go_on: Callable[[Mapping[int, Answer]], bool] = lambda answers: True,
        progress: Hear = nobody,
    ) -> Grid:
        """Answer every prompt with the full cache and under every cell.

        After the first ``first`` answers of the full cache, ``go_on`` may end the run.
        ``progress`` hears after every pass of the model how far all is.
        """
        self._check(prompts)
        grid = Grid(Outcome(), {index: Outcome() for index in range(len(cells))})
        before = self.seam.tokens

        def passed() -> None:
            progress(grid.progress(len(prompts), self.seam.tokens - before))

        waiting: list[HeldPrompt] = []  # answered by the full cache, not yet under the cells
        with self.seam.open(passed):
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
                waiting = []
        return grid

    def _check(self, prompts: Sequence[Prompt]) -> None:
        """See once that the model answers through us as it does by itself."""
        if not self._faithful and prompts:
            check_faithful(self.seam, max(prompts, key=lambda prompt: len(prompt.ids)).ids)
            self._faithful = True

    def _waves(
        self, prompts: Sequence[Prompt], cells: Sequence[Cell], grid: Grid, first: int
    ) -> Iterator[tuple[list[HeldPrompt], bool]]:
        """Prefill the prompts, those of a context together.

        Yields some at a time, and whether memory holds no more: then all that were yielded since
        the last time must be let go of.
        """
        sharing = [cell.policy for cell in cells if not prefills_alone(cell.policy)]
        observe = Observe(
            window=max([policy.window for policy in sharing], default=1),
            sums=any(policy.needs_sums for policy in sharing),
        )
        wave: list[HeldPrompt] = []
        used, most = 0, first
        for indices in by_context(prompts):
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
                wave.append(HeldPrompt(index, prompt, held))
                used += wave[-1].full.bytes
                full = used > self.memory // SHARE
                if full or len(wave) >= most:
                    yield wave, full
                    wave, most = [], len(prompts)
                    used = 0 if full else used
        yield wave, True

    def _baseline(self, wave: Sequence[HeldPrompt], grid: Grid, stopping: Stopping) -> None:
        """Let the full cache answer a wave of prompts; what it has answered before it repeats."""
        for batch in chunks(wave, lambda held: grown(held, stopping.most), self.memory // SHARE):
            started = perf_counter()
            asked = [question(held.prompt, stopping) for held in batch]
            answers = [Answer(list(self._answered.get(one, ()))) for one in asked]
            full = [held.full for held in batch]
            fresh = [i for i, answer in enumerate(answers) if not answer.tokens]
            if fresh:
                rows = Rows([full[i] for i in fresh])
                tails = [batch[i].prompt.tail for i in fresh]
                greedy(self.seam, rows, tails, [answers[i] for i in fresh], stopping)
            self._answered |= {
                one: answer.tokens for one, answer in zip(asked, answers, strict=True)
            }
            outcome = grid.baseline
            outcome.forwards += max(answer.forwards for answer in answers)
            for held, kept, answer in zip(batch, full, answers, strict=True):
                record(outcome, held, kept.held, answer, kept.bytes)
            outcome.seconds += perf_counter() - started

    def _draft_bytes(self, grid: Grid) -> Callable[[HeldPrompt], int]:
        """Tell what a prompt's draft logits take, in bytes."""
        vocabulary = self.seam.vocabulary

        def size(held: HeldPrompt) -> int:
            return len(grid.baseline.answers[held.index].tokens) * vocabulary * LOGIT_BYTES

        return size

    def _cells(
        self, part: Sequence[HeldPrompt], cells: Sequence[Cell], grid: Grid, stopping: Stopping
    ) -> None:
        """Answer some prompts under every cell."""
        if not cells:
            return
        tokens = [grid.baseline.answers[held.index].tokens for held in part]
        rows = Rows([held.full for held in part])
        logits = score_draft(self.seam, rows, [held.prompt.tail for held in part], tokens)
        drafts = [Draft(*found) for found in zip(tokens, logits, strict=True)]
        grid.disagreements += sum(draft.choices != draft.tokens for draft in drafts)
        own = OwnPrefills(self.seam)
        room = self.memory // SHARE
        answering = Answering(self.seam, cells, grid, stopping, room, self._rotation_for)
        for together in decoding_alike(cells):
            # made one by one, for those with prefills of their own hold caches of their own
            answering.run(
                job
                for held, draft in zip(part, drafts, strict=True)
                for job in self._select(held, draft, together, cells, grid, own)
            )

    def _select(
        self,
        held: HeldPrompt,
        draft: Draft,
        together: Sequence[int],
        cells: Sequence[Cell],
        grid: Grid,
        own: OwnPrefills,
    ) -> Iterator[Job]:
        """Choose what each cell keeps of a prompt; importance is rated once a policy."""
        rated: dict[int, tuple[list[Tensor], tuple[LayerState, ...]]] = {}
        for index in together:
            cell, outcome = cells[index], grid.cells[index]
            policy = cell.policy
            if outcome.problem is not None:
                continue
            try:
                turning = policy.needs_turn or (policy.rerotate and prefills_alone(policy))
                rotation = self._find_rotation() if turning else None
                if prefills_alone(policy):
                    kept, prefills = own.kept(held.prompt, index, cell, held.prefill, rotation)
                    outcome.prefills += prefills
                    job = Job(held, draft, index, [], [layer.budget for layer in kept.layers], kept)
                else:
                    if id(policy) not in rated:
                        mask = held.prompt.protection(policy, held.device)
                        turn = rotation.turn if rotation else None
                        states = held.prefill.states(held.prompt.about, mask, turn)
                        rated[id(policy)] = importances(policy, states), states
                    ratings, states = rated[id(policy)]
                    masks = keep_masks(policy, ratings, states, cell.ratio)
                    budgets = [policy.budget(state, cell.ratio) for state in states]
                    job = Job(held, draft, index, masks, budgets)
            except Exception as problem:  # other people's code: its cell fails alone
                fail(outcome, held, problem)
                continue
            yield job

    def _rotation_for(self, policy: Policy) -> Rotation | None:
        return self._find_rotation() if policy.rerotate else None

    def _find_rotation(self) -> Rotation:
        if self._rotation is None:
            self._rotation = find_rotation(self.seam)
        return self._rotation
