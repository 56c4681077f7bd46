"""What the engine is asked, prompts and cells, and what it answers: outcomes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pytest_kvguard.policies.base import DecodeEviction, Passage, Policy, Unit
from pytest_kvguard.progress import Progress

STOP_TOKENS = 16  # a stop string is looked for in this many of the last tokens


@dataclass(frozen=True)
class About:
    """What is known of a prompt's tokens beside their ids; positions."""

    units: tuple[Unit, ...] = ()
    unit_kind: str = "shots"  # what the units are
    passages: tuple[Passage, ...] = ()
    special: tuple[int, ...] = ()
    punctuation: tuple[int, ...] = ()


UNKNOWN = About()
"""Nothing is known beside the ids."""


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
        mask = torch.zeros(self.compressed, dtype=torch.bool)
        if policy.keeps_units and self.about.units:
            mask[:] = True
            for unit in self.about.units:
                for span in unit:
                    mask[span.start : span.stop] = False
        mask[[at for at in self.protected if at < self.compressed]] = True
        mask[self.fed :] = True
        return mask.to(device)


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
    def append_only(self) -> bool:
        """Whether all that is new stays, and all is held and read as it is."""
        return self.decode is None and self.policy.store is None and self.policy.read is None


@dataclass(frozen=True)
class Stopping:
    """When an answer is over."""

    most: int  # new tokens
    eos: frozenset[int]
    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether the answer came to its own end with its newest token."""
        if tokens[-1] in self.eos:
            return True
        if not self.strings:
            return False
        tail = self.decode(tokens[-STOP_TOKENS:])
        return any(string in tail for string in self.strings)

    def over(self, tokens: Sequence[int]) -> bool:
        """Whether to go on no further: ended, or cut off at the most tokens."""
        return len(tokens) >= self.most or self.ended(tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """Decode an answer without its end: nothing from a stop string on, no eos."""
        text = self.decode([token for token in tokens if token not in self.eos])
        cuts = [at for string in self.strings if (at := text.find(string)) >= 0]
        return text[: min(cuts)] if cuts else text


@dataclass
class Answer:
    """One row's answer while it is written."""

    tokens: list[int] = field(default_factory=list)
    kl: float | None = None  # mean KL(full || compressed) over the draft's tokens, in nats
    agreement: float | None = None  # share of the draft's tokens both would choose
    forwards: int = 0  # passes this row took part in
    fed: int = 0  # tokens of this row that went through the model


@dataclass
class Outcome:
    """What one cell, or the full cache, made of the prompts; filled as the grid runs."""

    answers: dict[int, Answer] = field(default_factory=dict)  # by the prompt's index
    held: list[Tensor] = field(default_factory=list)  # (layers, Hkv) fraction, one per prompt
    read: list[float] = field(default_factory=list)  # of what was held, one per prompt
    bytes_full: int = 0  # keys and values of all prompts with the full cache
    bytes_held: int = 0  # the same, of what was held
    bytes_padding: int = 0  # what heads that keep less than others of their layer add to that
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
    peak_bytes: int | None = None  # the most an accelerator held at a time; None: not measured

    def progress(self, prompts: int, tokens: int) -> Progress:
        """Say how far the answers to this many prompts are."""
        done = [len(outcome.answers) for outcome in self.cells.values()]
        answers = len(self.baseline.answers) + sum(done)
        whole = sum(count == prompts for count in done)
        return Progress(answers, prompts * (1 + len(done)), whole, tokens)
