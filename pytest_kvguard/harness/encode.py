"""From the text of a sample to the tokens of a prompt, each token with its part."""

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from pytest_kvguard.engine.grid import About, Prompt
from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies.base import Passage, Unit
from pytest_kvguard.tasks.base import Kind, Sample, Task
from pytest_kvguard.tasks.prompt import Message, Rendered, SpanKind, render
from pytest_kvguard.tasks.tokens import context_length, token_kinds, token_spans, unit_positions
from pytest_kvguard.tasks.units import MARKED, with_units
from pytest_kvguard.tokenizer_check import check_prompt

KINDS: tuple[Kind, ...] = ("system", "instruction", "shot", "document", "question")
PROTECTABLE = (*KINDS, "template")
DRAWN: tuple[Kind, ...] = ("shot", "document")
"""Parts of which a task might have drawn others; what it says of itself is the same for all."""


def encode(
    task: Task,
    samples: Sequence[Sample],
    tokenizer: Any,
    *,
    ahead: bool,
    protect: Collection[str] = (),
    units: str = MARKED,
) -> list[Prompt]:
    """Turn samples into prompts.

    ahead: compress the context before the question is seen; protect: the kinds of parts that
    every policy must keep, any of PROTECTABLE; units: what lives or dies together, one of
    KINDS_OF_UNITS. Raises InvalidArgument for a part that is unknown, a tokenizer without offsets
    and, under ``ahead``, a sample without context, and what `with_units` does.
    """
    check(tokenizer, protect)
    chat = task.chat and bool(getattr(tokenizer, "chat_template", None))
    return [_encode(sample, tokenizer, chat, ahead, protect, units) for sample in samples]


def contexts(samples: Sequence[Sample], prompts: Sequence[Prompt]) -> dict[str, str]:
    """Return, by sample id, which samples share a context: the id of the first that has it.

    That is all tokens before the question. Compressed ahead of the question it is one cache, so
    any will do; else only what holds a shot or a document, which luck chose for all that share it.
    What all samples share without sharing a cache is part of the task: it makes no cluster.
    """
    first: dict[tuple[int, ...], str] = {}
    found = {}
    for sample, prompt in zip(samples, prompts, strict=True):
        before = [p for p in prompt.about.passages if p.positions.start < prompt.context]
        if prompt.context and (prompt.ahead or any(p.kind in DRAWN for p in before)):
            found[sample.id] = first.setdefault(prompt.ids[: prompt.context], sample.id)
    of_the_task = len(first) == 1 and len(found) == len(samples) and not prompts[0].ahead
    return {} if of_the_task else found


def check(tokenizer: Any, protect: Collection[str]) -> None:
    """Raise InvalidArgument for parts that cannot be protected, and slow tokenizers."""
    for kind in protect:
        if kind not in PROTECTABLE:
            known = ", ".join(PROTECTABLE)
            raise InvalidArgument(f"cannot protect {kind!r}; known parts: {known}")
    if not getattr(tokenizer, "is_fast", False):
        raise InvalidArgument(
            f"{type(tokenizer).__name__} gives no character offsets, so shots cannot be found in "
            f"its tokens; use a fast tokenizer (one with a tokenizer.json)"
        )


def _within(length: int, units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Leave out what lies behind the part that is compressed."""
    clipped = (tuple(span for span in unit if span.stop <= length) for unit in units)
    return tuple(unit for unit in clipped if unit)


def _passages(kinds: Sequence[SpanKind], owners: Sequence[int]) -> tuple[Passage, ...]:
    """Group neighbouring tokens of the same part."""
    starts = [at for at in range(len(kinds)) if at == 0 or owners[at] != owners[at - 1]]
    return tuple(
        Passage(kinds[start], range(start, stop)) for start, stop in pairwise([*starts, len(kinds)])
    )


def _punctuation(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Find the tokens that are punctuation and nothing else."""
    words = (text[start:end].strip() for start, end in offsets)
    return tuple(at for at, word in enumerate(words) if word and not any(map(str.isalnum, word)))


def _encode(
    sample: Sample, tokenizer: Any, chat: bool, ahead: bool, protect: Collection[str], units: str
) -> Prompt:
    def in_template(messages: list[Message]) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text)

    rendered = render(sample, in_template if chat else None)
    return to_prompt(
        rendered,
        tokenizer,
        name=f"sample {sample.id!r}",
        templated=chat,
        ahead=ahead,
        protect=protect,
        units=units,
    )


def to_prompt(
    rendered: Rendered,
    tokenizer: Any,
    *,
    name: str,
    templated: bool,
    ahead: bool,
    protect: Collection[str] = (),
    units: str = MARKED,
) -> Prompt:
    """Turn a text with spans into a prompt.

    name: what errors call it; templated: whether the text holds its special tokens already; ahead,
    protect, units: as `encode` says. Raises what `encode` does. A text without a question has no
    context of its own: all of it is compressed, or nothing can be ahead of the question.
    """
    tokens = tokenizer(
        rendered.text, return_offsets_mapping=True, add_special_tokens=not templated, verbose=False
    )
    offsets = tokens["offset_mapping"]
    owners = token_spans(rendered.spans, offsets)
    kinds = token_kinds(rendered.spans, owners)
    template = [kind == "template" for kind in kinds]
    check_prompt(tokenizer, rendered.text, tokens.encodings[0], template, name=name)
    context = context_length(rendered.spans, owners) if "question" in kinds else 0
    if ahead and context == 0:
        raise InvalidArgument(
            f"{name} has nothing before its question, so there is no context to compress; use "
            f"--kv-protocol=prompt"
        )
    ids, special = tuple(tokens["input_ids"]), frozenset(tokenizer.all_special_ids)
    length = context if ahead else len(ids)
    spans = with_units(rendered, units).spans
    return Prompt(
        ids=ids,
        context=context,
        ahead=ahead,
        about=About(
            units=_within(length, unit_positions(spans, token_spans(spans, offsets))),
            unit_kind=units,
            passages=_passages(kinds[:length], owners),
            special=tuple(at for at, id in enumerate(ids[:length]) if id in special),
            punctuation=_punctuation(rendered.text, offsets[:length]),
        ),
        protected=tuple(at for at, kind in enumerate(kinds) if kind in protect),
    )
