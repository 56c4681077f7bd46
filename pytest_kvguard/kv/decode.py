"""Greedy answers from rows: step by step, or checked in one go against a draft."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.kv.rows import Rows
from pytest_kvguard.kv.seam import Seam

WORTH_KEEPING = 0.8
"""While this share of the rows goes on, the others are carried along: copying costs more."""

STOP_TOKENS = 16  # a stop string is looked for in this many of the last tokens


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
    """One row's answer while it grows."""

    tokens: list[int] = field(default_factory=list)
    kl: float | None = None  # mean KL(full || compressed) over the draft's tokens, in nats
    agreement: float | None = None  # share of the draft's tokens both would choose
    forwards: int = 0  # passes this row took part in
    fed: int = 0  # tokens of this row that went through the model


def greedy(
    seam: Seam,
    rows: Rows,
    pending: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    stopping: Stopping,
) -> None:
    """Let every row write on, one token at a time, until its answer is over.

    pending: what each row is fed first, at least one token. ``answers`` grow in place.
    """
    row_answers, feed = list(answers), [list(tokens) for tokens in pending]
    over = [False] * len(row_answers)
    while not all(over):
        chosen = rows.feed(seam, feed, last=1)[:, -1].argmax(dim=-1).tolist()
        for row, (answer, token) in enumerate(zip(row_answers, chosen, strict=True)):
            if not over[row]:
                answer.tokens.append(token)
                answer.forwards += 1
                answer.fed += len(feed[row])
                over[row] = stopping.over(answer.tokens)
        going = [row for row, done in enumerate(over) if not done]
        if 0 < len(going) < WORTH_KEEPING * len(over):
            rows.take(going)
            row_answers, over = [row_answers[row] for row in going], [False] * len(going)
        feed = [[answer.tokens[-1]] for answer in row_answers]


def score_draft(
    seam: Seam, rows: Rows, tails: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Feed each row its prompt's tail and its draft in one go.

    Returns for each row the logits that decide its draft's tokens, (len(draft), V).
    """
    width = max(len(draft) for draft in drafts)
    feed = [[*tail, *draft[:-1]] for tail, draft in zip(tails, drafts, strict=True)]
    logits = rows.feed(seam, feed, last=width)  # (R, width, V)
    return [logits[row, width - len(draft) :] for row, draft in enumerate(drafts)]


@dataclass(frozen=True)
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


def judge(own: Tensor, draft: Draft, tail: int) -> Answer:
    """Turn a row's logits over a draft, (len(draft), V), into what it would have written so far.

    An answer that agrees all along is the whole draft; another ends with the first token on which
    the row differs. tail: tokens of the prompt that were fed before the draft.
    """
    writes = own.argmax(dim=-1).tolist()
    same = shared(writes, draft.tokens)
    tokens = list(draft.tokens) if same == len(writes) else [*draft.tokens[:same], writes[same]]
    kl = divergence(draft.log_probabilities, F.log_softmax(own.float(), -1))
    alike = sum(a == b for a, b in zip(writes, draft.choices, strict=True))
    return Answer(tokens, kl, alike / len(writes), forwards=1, fed=tail + len(writes) - 1)


def divergence(full: Tensor, own: Tensor) -> float:
    """Return the mean KL(full || own) over tokens in nats; log-probabilities (n, V)."""
    kl = F.kl_div(own, full, reduction="none", log_target=True).sum(dim=-1).mean()
    return max(0.0, kl.item())


def shared(first: Iterable[int], second: Iterable[int]) -> int:
    """Count the tokens two sequences have in common from the start."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
