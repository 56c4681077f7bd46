"""What the engine is asked and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pytest_kvguard.kv.decode import Answer
from pytest_kvguard.kv.prefill import UNKNOWN, About
from pytest_kvguard.policies.base import DecodeEviction, Policy
from pytest_kvguard.progress import Progress


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens."""

    ids: tuple[int, ...]
    context: int  # tokens before the question; prompts that share them share their prefill
    ahead: bool = False  # compress the context, before the question is seen
    about: About = UNKNOWN  # token positions, all inside what is compressed
    protected: tuple[int, ...] = ()  # token positions every policy must keep

    @property
    def compressed(self) -> int:
        """How many tokens are compressed; the keep ratio is a share of these."""
        return self.context if self.ahead else len(self.ids)

    @property
    def fed(self) -> int:
        """The first token fed through the compressed cache.

        Without a question to feed, that is the last token of the prompt once more: the answer
        must be read from the compressed cache, all of it.
        """
        return self.context if self.ahead else len(self.ids) - 1

    @property
    def tail(self) -> tuple[int, ...]:
        """The tokens fed through the compressed cache before the answer, at least one."""
        return self.ids[self.fed :]

    def protection(self, policy: Policy, device: torch.device) -> Tensor:
        """Mark what this policy must keep, (compressed,) bool.

        Always what the prompt protects and a last token that is fed again; under a policy that
        keeps whole units, also everything outside them.
        """
        mask = torch.zeros(self.compressed, dtype=torch.bool, device=device)
        if policy.keeps_units and self.about.units:
            mask[:] = True
            for unit in self.about.units:
                for span in unit:
                    mask[span.start : span.stop] = False
        mask[[at for at in self.protected if at < self.compressed]] = True
        mask[self.fed :] = True
        return mask


@dataclass(frozen=True)
class Cell:
    """One policy at one keep ratio."""

    policy: Policy
    ratio: float

    @property
    def decode_ratio(self) -> float:
        """Keep ratio while decoding."""
        return self.ratio if self.policy.decode_ratio is None else self.policy.decode_ratio

    @property
    def decode(self) -> DecodeEviction | None:
        """What goes while decoding; nothing does at ratio 1, which keeps all."""
        return None if self.decode_ratio >= 1 else self.policy.decode

    @property
    def grows(self) -> bool:
        """Whether all that is new stays, and all is held and read as it is."""
        return self.decode is None and self.policy.store is None and self.policy.read is None


@dataclass
class Outcome:
    """What one cell, or the full cache, made of the prompts; filled as the grid runs."""

    answers: dict[int, Answer] = field(default_factory=dict)  # by the prompt's index
    held: list[Tensor] = field(default_factory=list)  # (layers, Hkv) fraction, one per prompt
    read: list[float] = field(default_factory=list)  # of what was held, one per prompt
    bytes_full: int = 0  # keys and values of all prompts with the full cache
    bytes_held: int = 0  # the same, of what was held
    forwards: int = 0  # passes that carried at least one of this cell's rows
    tokens: int = 0  # tokens of this cell's rows that went through the model
    prefills: int = 0  # that were run for this cell alone
    seconds: float = 0.0  # of the batches it was in, shared by tokens
    evicted: int = 0  # generated or fed tokens, and prompt tokens, that went while decoding
    problem: tuple[int, str] | None = None  # a prompt that could not be measured, and why


@dataclass
class Grid:
    """Everything one run of the engine measured."""

    baseline: Outcome
    cells: Mapping[int, Outcome]  # by the cell's index
    prefills: int = 0  # contexts prefilled from their first token, for all cells at once
    abandoned: bool = False  # ended after the first answers of the full cache
    disagreements: int = 0  # prompts whose baseline, read in one go, rounds to another token

    def progress(self, prompts: int, tokens: int) -> Progress:
        """Say how far the answers to this many prompts are."""
        done = [len(outcome.answers) for outcome in self.cells.values()]
        answers = len(self.baseline.answers) + sum(done)
        whole = sum(count == prompts for count in done)
        return Progress(answers, prompts * (1 + len(done)), whole, tokens)
