"""From a sample to the text a model reads, with every character in exactly one span."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.tasks.base import Kind, Part, Sample

SpanKind = Kind | Literal["template"]
"""The kind of a part, or ``template`` for what the chat template or the tokenizer adds."""

Message = dict[str, str]
"""``{"role": "system" or "user", "content": text}``."""

Template = Callable[[list[Message]], str]
"""Messages -> text, ending where the assistant is to write (with the generation prompt)."""


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` (exclusive) of a rendered prompt."""

    start: int
    end: int
    kind: SpanKind
    unit: str | None = None


@dataclass(frozen=True)
class Rendered:
    """A prompt as text. Its spans follow each other without a gap from 0 to the end."""

    text: str
    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        at = 0
        for span in self.spans:
            if span.start != at or span.end <= at:
                raise InvalidArgument(f"a span must start at {at} and not be empty, got {span}")
            at = span.end
        if at != len(self.text):
            raise InvalidArgument(f"the spans end at {at}, but the text at {len(self.text)}")


def render(sample: Sample, template: Template | None = None) -> Rendered:
    """Write a sample as one text: its parts as they are, or as messages in a chat template.

    What a template returns holds its special tokens: tokenize it without adding them again.
    Templates may strip white space at the ends of a message; the spans there are shorter then.

    Raises InvalidArgument for parts out of order, and, naming the lost text, for a template that
    refuses a message or does not write it as it is.
    """
    _check(sample)
    if template is None:
        return _joined(_pieces(sample.parts))
    return _joined(_in_template(sample, template))


def messages(sample: Sample) -> list[Message]:
    """Return the system parts as a system message, if any, and all others as one user message."""
    return [{"role": role, "content": _content(parts)} for role, parts in _turns(sample).items()]


Piece = tuple[str, SpanKind, str | None]
"""Text that becomes one span, its kind and its unit."""

_PROBES = {"system": "kvguard-system-probe", "user": "kvguard-user-probe"}
"""What stands for each message while the text around the messages is found."""

_TRIMS: tuple[Callable[[str], str], ...] = (str, str.rstrip, str.lstrip, str.strip)
"""What a template may do to the ends of a message; nothing comes first."""


def _check(sample: Sample) -> None:
    kinds = [part.kind for part in sample.parts]
    if "system" in kinds[kinds.count("system") :]:
        raise InvalidArgument(f"sample {sample.id!r}: system parts come first, got {kinds}")
    if not kinds or kinds[-1] != "question" or not sample.parts[-1].text.strip():
        raise InvalidArgument(f"sample {sample.id!r}: the last part must be a question with text")


def _turns(sample: Sample) -> dict[str, list[Part]]:
    system = [part for part in sample.parts if part.kind == "system"]
    user = [part for part in sample.parts if part.kind != "system"]
    return ({"system": system} if system else {}) | {"user": user}


def _content(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts)


def _pieces(parts: Sequence[Part]) -> list[Piece]:
    return [(part.text, part.kind, part.unit) for part in parts]


def _joined(pieces: Sequence[Piece]) -> Rendered:
    text, spans = "", []
    for piece, kind, unit in pieces:
        if piece:
            spans.append(Span(len(text), len(text) + len(piece), kind, unit))
            text += piece
    return Rendered(text, tuple(spans))


def _in_template(sample: Sample, template: Template) -> list[Piece]:
    turns = _turns(sample)
    *before, tail = _frame(sample, template)
    text = _apply(template, messages(sample), sample)
    for trims in product(_TRIMS, repeat=len(turns)):
        pieces: list[Piece] = []
        for around, parts, trim in zip(before, turns.values(), trims, strict=True):
            pieces += [(around, "template", None), *_clipped(parts, trim)]
        pieces.append((tail, "template", None))
        if "".join(piece for piece, _, _ in pieces) == text:
            return pieces
    lost = next((p.text for p in sample.parts if p.text.strip() not in text), None)
    if lost is not None:
        raise _lost(sample, lost, "is not in what the chat template returns")
    raise _lost(sample, _content(sample.parts), "changes what the chat template writes around it")


def _frame(sample: Sample, template: Template) -> list[str]:
    """Return the text a template writes before each message, and after the last."""
    turns = _turns(sample)
    probes = [{"role": role, "content": _PROBES[role]} for role in turns]
    rest, frame = _apply(template, probes, sample), []
    for role, parts in turns.items():
        if rest.count(_PROBES[role]) != 1:
            raise _lost(sample, _content(parts), f"is no {role} message to the chat template")
        around, _, rest = rest.partition(_PROBES[role])
        frame.append(around)
    return [*frame, rest]


def _apply(template: Template, wanted: list[Message], sample: Sample) -> str:
    from jinja2 import TemplateError  # what templates raise to refuse a role

    try:
        return template(wanted)
    except TemplateError as error:
        first = next(iter(_turns(sample).values()))
        raise _lost(sample, _content(first), f"is refused by the chat template: {error}") from error


def _clipped(parts: Sequence[Part], trim: Callable[[str], str]) -> list[Piece]:
    """Return the pieces of a message whose ends are trimmed."""
    content = _content(parts)
    kept = trim(content)
    first, last = content.find(kept), content.find(kept) + len(kept)
    pieces: list[Piece] = []
    at = 0
    for text, kind, unit in _pieces(parts):
        clipped = text[max(0, first - at) : max(0, last - at)]
        pieces.append((clipped, kind, unit))
        at += len(text)
    return pieces


def _lost(sample: Sample, text: str, why: str) -> InvalidArgument:
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return InvalidArgument(
        f"sample {sample.id!r}: {shown!r} {why}; "
        f"give the task chat=False, or move that text to a part of another kind"
    )
