"""What the engine has in hand: prompts, their drafts, and the rows to come."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pytest_kvguard.kv.compress import Kept, keep, keep_all
from pytest_kvguard.kv.decode import Answer, Draft, Stopping
from pytest_kvguard.kv.grid import Outcome, Prompt
from pytest_kvguard.kv.prefill import Prefill
from pytest_kvguard.kv.rope import Rotation
from pytest_kvguard.kv.rows import GROWTH

LOGIT_BYTES = 12  # a float32 logit, its log-softmax, and the reference's


@dataclass(frozen=True)
class HeldPrompt:
    """A prompt with its prefill."""

    index: int
    prompt: Prompt
    prefill: Prefill

    @property
    def device(self) -> torch.device:
        """Where its keys and values are."""
        return self.prefill.layers[0].keys.device

    @cached_property
    def full(self) -> Kept:
        """Everything before what is fed again."""
        return keep_all(self.prefill, self.prompt.fed)


@dataclass(frozen=True)
class Job:
    """A row to come: one prompt under one cell."""

    held: HeldPrompt
    draft: Draft
    cell: int
    masks: list[Tensor]  # none when it has a cache of its own
    budgets: list[int]
    own: Kept | None = None  # from a prefill for this cell alone

    @cached_property
    def most(self) -> int:
        """Positions of the prompt that a head may start from: a layer's budget, or an own share."""
        if self.own is not None:
            return int(self.own.held.max())
        fullest = torch.stack([mask.sum(dim=-1).max() for mask in self.masks]).max()
        return max(*self.budgets, int(fullest))


Question = tuple[tuple[int, ...], int, int, frozenset[int], tuple[str, ...]]
"""All that the full cache's answer depends on, but for the model."""


def question(prompt: Prompt, stopping: Stopping) -> Question:
    """Return what tells two questions apart."""
    return prompt.ids, prompt.fed, stopping.most, stopping.eos, stopping.strings


def by_context(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Group the indices of prompts that begin with the same context, by first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt.ids[: prompt.context] or (-1 - index,), []).append(index)
    return list(groups.values())


def fail(outcome: Outcome, held: HeldPrompt, problem: Exception) -> None:
    """Note the first prompt that a cell failed on; its other prompts are not tried."""
    if outcome.problem is None:
        outcome.problem = held.index, f"{type(problem).__name__}: {problem}"


def grown(held: HeldPrompt, new: int) -> int:
    """Bytes of a full row with ``new`` generated tokens."""
    return held.full.bytes * (held.prompt.compressed + new) // max(1, held.prompt.fed)


def row_bytes(job: Job, borrowed: bool) -> int:
    """Bytes a row takes at the most while it reads its draft: its cache, and the draft's logits."""
    logits = job.draft.logits.numel() * LOGIT_BYTES
    return logits + cache_bytes(job, borrowed, 0 if borrowed else GROWTH)


def cache_bytes(job: Job, borrowed: bool, room: int) -> int:
    """Bytes of what a row holds at the most, with its draft and ``room`` for more tokens.

    Every head counts as the fullest, for rows decoded together are as long as the longest of them
    head by head. borrowed: what is kept is copied for no more than one layer at a time.
    """
    prompt = job.held.prompt
    token = job.held.full.bytes / max(1, prompt.fed)
    copied = job.most / len(job.held.prefill.layers) if borrowed else job.most
    return int(token * (copied + len(prompt.tail) + len(job.draft.tokens) + room))


def kept_of(job: Job, rotation: Rotation | None) -> Kept:
    """Gather what a row starts from."""
    if job.own is not None:
        return job.own
    held = job.held
    return keep(held.prefill, job.masks, job.budgets, held.prompt.fed, rotation)


def record(outcome: Outcome, held: HeldPrompt, counts: Tensor, answer: Answer, size: int) -> None:
    """Add one prompt's answer to a cell's outcome.

    counts: (layers, Hkv) positions it started from, which took ``size`` bytes.
    """
    again = held.prompt.compressed - held.prompt.fed  # tokens of the prompt that were fed again
    outcome.answers[held.index] = answer
    outcome.held.append((counts.cpu().double() + again) / held.prompt.compressed)
    outcome.bytes_full += held.full.bytes
    outcome.bytes_held += size
    outcome.tokens += answer.fed
