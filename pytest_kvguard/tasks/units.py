"""What of a prompt lives or dies together: what the task marks, or what is found in its text."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from pytest_kvguard.errors import UnknownName
from pytest_kvguard.tasks.prompt import Rendered, Span
from pytest_kvguard.tasks.splitters import UNITS, Extent

MARKED = "shots"
"""The units that the task marks; shots, but for documents their sentences, rules, ..."""

KINDS_OF_UNITS = (MARKED, *UNITS)
FIXED = ("question", "template")
"""Parts that belong to no unit."""


def with_units(rendered: Rendered, kind: str) -> Rendered:
    """Return the same text in units of this kind, one of KINDS_OF_UNITS; spans are cut at theirs.

    Units are looked for in all parts but the question and the template. A sentence lies in one
    part; other units may go on over neighbouring parts of the same kind, but each shot is read by
    itself. Raises UnknownName for another kind, and Unavailable as the splitters do.
    """
    if kind == MARKED:
        return rendered
    if kind not in UNITS:
        raise UnknownName("kind of units", kind, KINDS_OF_UNITS)
    found = [
        (start + first, start + last)
        for start, end in _stretches(rendered.spans, apart=kind == "sentences")
        for first, last in UNITS[kind](rendered.text[start:end])
    ]
    return Rendered(rendered.text, tuple(_pieces(rendered.spans, found, kind)))


def _stretches(spans: Sequence[Span], *, apart: bool) -> Iterator[Extent]:
    """Yield each text to be searched on its own. apart: every part is one."""

    def place(numbered: tuple[int, Span]) -> object:
        number, span = numbered
        return number if apart else (span.kind, span.unit if span.kind == "shot" else None)

    for _, group in groupby(enumerate(spans), place):
        together = [span for _, span in group]
        if together[0].kind not in FIXED:
            yield together[0].start, together[-1].end


def _pieces(spans: Sequence[Span], found: Sequence[Extent], kind: str) -> Iterator[Span]:
    """Cut the spans at the edges of the units, and say of each piece to which it belongs."""
    edges = {edge for extent in found for edge in extent}
    edges |= {edge for span in spans for edge in (span.start, span.end)}
    starts, openings = [span.start for span in spans], [start for start, _ in found]
    for start, end in pairwise(sorted(edges)):
        span = spans[bisect_right(starts, start) - 1]
        number = bisect_right(openings, start) - 1
        inside = number >= 0 and start < found[number][1]
        yield Span(start, end, span.kind, f"{kind} {number}" if inside else None)
