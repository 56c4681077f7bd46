"""From the tokens of a rendered prompt back to its spans; each token belongs to one at most."""

from bisect import bisect_right
from collections.abc import Sequence

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.tasks.prompt import Span, SpanKind

Offsets = Sequence[tuple[int, int]]
"""Characters (start, end) of each token, as a fast tokenizer gives them."""

ADDED = -1
"""In place of the index of a span: a token that stands for no character, such as BOS."""


def token_spans(spans: Sequence[Span], offsets: Offsets) -> tuple[int, ...]:
    """Return the index of the span that holds each token's first character.

    Empty offsets at 0 mean a special token that the tokenizer adds: ADDED. Empty offsets further
    on mean white space that the tokenizer trims; it begins where the last token ended.
    """
    starts, length = [span.start for span in spans], spans[-1].end if spans else 0
    owners, seen = [], 0  # characters up to the end of the last token
    for start, end in offsets:
        if not 0 <= start <= end <= length:
            raise InvalidArgument(
                f"token offsets {(start, end)} do not fit a text of {length} characters"
            )
        first = start if start < end else min(seen, start, length - 1)
        owners.append(bisect_right(starts, first) - 1 if end > 0 else ADDED)
        seen = max(seen, end)
    return tuple(owners)


def token_kinds(spans: Sequence[Span], owners: Sequence[int]) -> tuple[SpanKind, ...]:
    """Return the kind of each token, given the spans they belong to; ``template`` for ADDED."""
    return tuple("template" if owner == ADDED else spans[owner].kind for owner in owners)


def unit_positions(spans: Sequence[Span], owners: Sequence[int]) -> tuple[tuple[range, ...], ...]:
    """Return the token positions of each unit: disjoint ranges, in the order of first appearance.

    A unit that owns no token is left out.
    """
    units: dict[str, list[range]] = {}
    for position, owner in enumerate(owners):
        unit = None if owner == ADDED else spans[owner].unit
        if unit is None:
            continue
        ranges = units.setdefault(unit, [])
        if ranges and ranges[-1].stop == position:
            ranges[-1] = range(ranges[-1].start, position + 1)
        else:
            ranges.append(range(position, position + 1))
    return tuple(tuple(ranges) for ranges in units.values())


def context_length(spans: Sequence[Span], owners: Sequence[int]) -> int:
    """Return how many tokens come before the first token of a question."""
    kinds = token_kinds(spans, owners)
    if "question" not in kinds:
        raise InvalidArgument("no token belongs to a question, and a prompt must end with one")
    return kinds.index("question")
