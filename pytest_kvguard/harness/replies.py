"""How a reply ends, and what in it is the answer: reasoning traces, stop strings, loops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any, Literal

from pytest_kvguard.engine import grid
from pytest_kvguard.engine.grid import STOP_TOKENS
from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.repetition import loops
from pytest_kvguard.tasks.base import Task
from pytest_kvguard.tasks.traces import TAGS, Traces, opened_by, split_traces
from pytest_kvguard.tasks.turns import cut_at_stop

Ending = Literal["ended", "truncated", "looped"]
"""``ended`` by the model itself; ``truncated`` at the most new tokens, or inside a reasoning trace;
``looped``: cut off because it went round in a loop."""

LOOK_EVERY = 32
"""Tokens between two looks for a loop."""

PROMPT_TAIL = 16
"""The last tokens of a prompt, which may open a reasoning trace."""


@dataclass(frozen=True)
class Reply:
    """A completion, taken apart."""

    answer: str  # what a scorer marks: no trace, nothing from a stop string on, no end token
    trace: str  # what was written inside a reasoning trace
    ending: Ending


@dataclass(frozen=True)
class Stopping(grid.Stopping):
    """When an answer is over; stop strings inside a reasoning trace end nothing.

    All of it depends on the tokens of a reply alone, so that what reads a draft stops where the
    draft did. Raises InvalidArgument for an empty stop string, which would end every answer.
    """

    prompt_tail: str = ""  # the end of the prompts, which may open a reasoning trace

    def __post_init__(self) -> None:
        if "" in self.strings:
            raise InvalidArgument(f"a stop string must not be empty, got {self.strings!r}")

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether the model ended the reply with its newest token."""
        if tokens[-1] in self.eos:
            return True
        if not self._may_stop(tokens):
            return False
        answer = self._split(tokens).answer
        return any(string in answer for string in self.strings)

    def over(self, tokens: Sequence[int]) -> bool:
        """Whether to go on no further: ended, cut off at the most tokens, or in a loop."""
        if len(tokens) >= self.most or self.ended(tokens):
            return True
        return len(tokens) % LOOK_EVERY == 0 and loops(tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """Decode the answer: no trace, nothing from a stop string on, no end token."""
        return cut_at_stop(self._split(tokens).answer, self.strings)

    def read(self, tokens: Sequence[int]) -> Reply:
        """Take a reply apart that is over."""
        trace, _, is_open = self._split(tokens)
        ending: Ending = "truncated"
        if self.ended(tokens) and not is_open:
            ending = "ended"
        elif loops(tokens):
            ending = "looped"
        return Reply(self.text(tokens), trace, ending)

    def _split(self, tokens: Sequence[int]) -> Traces:
        written = self.decode([token for token in tokens if token not in self.eos])
        return split_traces(written, self.prompt_tail)

    def _may_stop(self, tokens: Sequence[int]) -> bool:
        """Whether the newest token completes a stop string, which may yet be inside a trace.

        Older ones were looked at when they were new: decoding a long reply for each takes long.
        """
        if not self.strings:
            return False
        tail = tokens[-STOP_TOKENS:]
        now = self.decode(tail)
        both = zip(self.decode(tail[:-1]), now, strict=False)
        old = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
        return any(
            (at := now.rfind(string)) >= 0 and at + len(string) > old for string in self.strings
        )


def stopping(
    task: Task,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    eos: frozenset[int],
    decode: Callable[[Sequence[int]], str],
) -> Stopping:
    """Return when the answers to a task's prompts are over.

    prompts: token ids; decode: token ids -> text without special tokens. Raises InvalidArgument
    where some prompts open a reasoning trace and others do not.
    """
    readable = decode_with_tags(tokenizer, decode)
    tails = [tail_of(ids, readable) for ids in prompts]
    opened = {opened_by(tail) for tail in tails}
    if len(opened) > 1:
        raise InvalidArgument(
            f"task {task.name!r}: some prompts open a reasoning trace and others do not; end all "
            f"of them alike, such as ...{tails[0][-40:]!r}"
        )
    return Stopping(task.max_new_tokens, eos, task.stop, readable, tails[0])


def tail_of(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
    """Decode the end of a prompt, which may open a reasoning trace."""
    return decode(list(ids[-PROMPT_TAIL:]))


def decode_with_tags(
    tokenizer: Any, decode: Callable[[Sequence[int]], str]
) -> Callable[[Sequence[int]], str]:
    """Return ``decode`` that also writes those special tokens that tag reasoning traces.

    decode: token ids -> text without special tokens.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    tags = {
        number: token.content
        for number, token in added.items()
        if token.special and any(token.content in tag for pair in TAGS for tag in pair)
    }
    if not tags:
        return decode

    def with_tags(tokens: Sequence[int]) -> str:
        pieces = (
            "".join(tags[token] for token in group) if is_tag else decode(list(group))
            for is_tag, group in groupby(tokens, tags.__contains__)
        )
        return "".join(pieces)

    return with_tags
