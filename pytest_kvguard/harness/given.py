"""A prompt from whatever a test has: text, messages, the parts of a prompt, a task's sample."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from pytest_kvguard.engine.grid import Prompt
from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.harness.encode import check, to_prompt
from pytest_kvguard.tasks.base import Part, Sample
from pytest_kvguard.tasks.prompt import Message, Rendered, Span, SpanKind, Template, render
from pytest_kvguard.tasks.units import MARKED

Given = str | Sample | Sequence[Part] | Sequence[Mapping[str, str]]
"""A text as it is; a sample of a task, or parts of one; or messages with ``role`` and
``content``."""


Kind = TypeVar("Kind")


def prompt_from(
    given: Given,
    tokenizer: Any,
    *,
    ahead: bool = False,
    protect: Collection[str] = (),
    units: str = MARKED,
) -> Prompt:
    """Turn what is given into a prompt.

    A text stays as it is, and is one document. Samples and parts are written in the chat template
    where the tokenizer has one, as in a run of their task. Of messages, the last user's is the
    question, and each earlier one is a shot together with its answer.

    ahead, protect, units: as `encode` says. Raises InvalidArgument for what is empty or none of
    these, for messages without a chat template, and what `encode` does.
    """
    check(tokenizer, protect)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    name, templated = "the prompt", has_template
    if isinstance(given, str):
        if not given:
            raise InvalidArgument("there is nothing to compress in an empty text")
        rendered = Rendered(given, (Span(0, len(given), "document"),))
        templated = False
    elif isinstance(given, Sample) or (parts := _all(given, Part)):
        sample = given if isinstance(given, Sample) else Sample("given", tuple(parts), ("",))
        name = f"sample {sample.id!r}"
        rendered = render(sample, _template(tokenizer) if has_template else None)
    elif messages := _all(given, dict):
        if not has_template:
            raise InvalidArgument(
                "messages need a chat template, and this model's tokenizer has none; give a text"
            )
        rendered = _in_turns([dict(message) for message in messages], tokenizer)
    else:
        raise InvalidArgument(
            f"a prompt is a text, a sample, its parts or messages, got {given!s:.80}"
        )
    return to_prompt(
        rendered,
        tokenizer,
        name=name,
        templated=templated,
        ahead=ahead,
        protect=protect,
        units=units,
    )


def _all(given: Any, kind: type[Kind]) -> list[Kind]:
    """Return what is given as a list if all of it is of this kind, or an empty list."""
    if not isinstance(given, Sequence) or not all(isinstance(one, kind) for one in given):
        return []
    return list(given)


def _template(tokenizer: Any) -> Template:
    def template(messages: list[Message]) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text)

    return template


def _in_turns(messages: Sequence[Message], tokenizer: Any) -> Rendered:
    """Write messages in the chat template, and find each again in what it wrote."""
    for message in messages:
        if message.keys() != {"role", "content"} or not isinstance(message["content"], str):
            raise InvalidArgument(
                f"a message has a role and a content in text, got {message!r:.80}"
            )
    if not messages or messages[-1]["role"] != "user":
        raise InvalidArgument("the last message must be the user's: it is what is asked")
    text = _template(tokenizer)(list(messages))
    spans: list[Span] = []
    at = shot = 0
    for number, message in enumerate(messages):
        content = message["content"].strip()  # templates trim
        start = text.find(content, at)
        if start < 0 or not content:
            raise InvalidArgument(
                f"message {number} ({message['role']}) is not in what the chat template wrote: "
                f"{content[:60]!r}; use the roles that the template knows"
            )
        kind: SpanKind = "shot"
        if message["role"] == "system":
            kind = "system"
        elif number == len(messages) - 1:
            kind = "question"
        shot += message["role"] == "user"
        if start > at:
            spans.append(Span(at, start, "template"))
        at = start + len(content)
        spans.append(Span(start, at, kind, f"shot {shot}" if kind == "shot" else None))
    if at < len(text):
        spans.append(Span(at, len(text), "template"))
    return Rendered(text, tuple(spans))
