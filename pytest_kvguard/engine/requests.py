"""Requests: prompts under cells, with what they keep. Each becomes a row."""

from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.engine.grid import Answer, Cell, Prompt
from pytest_kvguard.engine.rope import Rotation
from pytest_kvguard.engine.select import Kept, keep_all
from pytest_kvguard.engine.stack import Prefill


@dataclass(frozen=True, eq=False)
class HeldPrompt:
    """A prompt with its prefill."""

    index: int
    prompt: Prompt
    prefill: Prefill

    @cached_property
    def full(self) -> Kept:
        """Everything before what is fed again."""
        return keep_all(self.prefill, self.prompt.fed)


@dataclass(frozen=True, eq=False)
class Draft:
    """An answer of the full cache and the logits that decided it."""

    tokens: list[int]
    logits: Tensor  # (len(tokens), V)

    @cached_property
    def choices(self) -> list[int]:
        """What the full cache chooses at each token, when the answer is read in one go."""
        return self.logits.argmax(dim=-1).tolist()

    @cached_property
    def log_probabilities(self) -> Tensor:
        """In nats, (len(tokens), V) float32."""
        return F.log_softmax(self.logits.float(), -1)


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt under one cell: a row to come."""

    held: HeldPrompt
    draft: Draft
    index: int  # of the cell
    cell: Cell
    kept: Kept
    rotation: Rotation | None = None  # keys stay at their index in the cache

    @property
    def in_stack(self) -> bool:
        """Whether all it keeps lies in the prefill's stack, and all that is new is appended."""
        return self.cell.append_only and self.kept.own is None

    @property
    def most(self) -> float:
        """Positions its row takes, padding included, mean over the layers."""
        return float(self.kept.held.amax(dim=1).double().mean())


def kept_bytes(request: Request) -> int:
    """Bytes of a copy of what a request keeps, padding included."""
    return int(request.kept.prefill.stack.position_bytes * request.most)


@dataclass(frozen=True, eq=False)
class VerifiedRow:
    """A request whose draft was read."""

    request: Request
    answer: Answer  # so far
    evicted: int  # slots that were emptied meanwhile
    stored: int | None  # bytes of the codes it began with, if it stores codes
    read: float | None  # share of what it holds that it read; None: all of it
    new: dict[int, tuple[Tensor, Tensor]] | None
    """By layer, keys and values (Hkv, n, D) of the tail and the tokens it agreed with; None: it is
    done, or must start over."""

    @property
    def start(self) -> int:
        """The position of the first token it was fed."""
        return self.request.held.prompt.fed

    @property
    def fed(self) -> int:
        """How many of the tokens it was fed still count: none if it starts over."""
        return 0 if self.new is None else next(iter(self.new.values()))[0].shape[1]

    @property
    def feed(self) -> list[int]:
        """What it is fed next: its last token, or all anew if what it held is gone."""
        if self.new is not None:
            return self.answer.tokens[-1:]
        return [*self.request.held.prompt.tail, *self.answer.tokens]
