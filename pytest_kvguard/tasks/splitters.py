"""Where the units of a text lie: sentences, paragraphs, turns, fenced code blocks, JSON values.

Text in, extents out: disjoint, in order, none of white space alone. Between two units a line end
belongs to the one it ends and a blank to the one it precedes, as tokenizers write tokens.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from pytest_kvguard.errors import Unavailable

Extent = tuple[int, int]
"""Characters from, to (exclusive)."""

Splitter = Callable[[str], list[Extent]]
"""text -> the extent of each unit; what lies between them is in none."""

LANGUAGE = "en"
"""Whose abbreviations a full stop may belong to."""

BLANKS = " \t"
STRANGE_BLANK = re.compile(r"[^\S\r\n\t ]")
LINE_END = re.compile(r"\r\n?|\n")  # what markdown-it takes for one
EMPTY_LINES = re.compile(r"\n\s*\n")
SPEAKER = re.compile(
    r"^[ \t]*(?:system|user|human|assistant|ai|bot|tool)[ \t]*:", re.IGNORECASE | re.MULTILINE
)


def sentences(text: str) -> list[Extent]:
    """Find English sentences; together they are the whole text.

    By sentencex (Wikimedia, MIT). Raises Unavailable where it is not installed.
    """
    try:
        from sentencex import get_sentence_boundaries
    except ImportError:
        raise _missing("sentences", "sentencex") from None
    plain = STRANGE_BLANK.sub(" ", text)  # sentencex 1.0.32 panics at some, as in "B\xa0."
    return _cut(text, [found["start_index"] for found in get_sentence_boundaries(LANGUAGE, plain)])


def paragraphs(text: str) -> list[Extent]:
    """Find what empty lines part; together they are the whole text."""
    return _cut(text, [found.end() for found in EMPTY_LINES.finditer(text)])


def turns(text: str) -> list[Extent]:
    """Find the turns of a dialogue, each from a line such as ``User: ...`` to the next one.

    Known speakers: system, user, human, assistant, ai, bot and tool, in any case. What comes
    before the first is no turn.
    """
    starts = [found.start() for found in SPEAKER.finditer(text)]
    return list(pairwise([*starts, len(text)])) if starts else []


def code(text: str) -> list[Extent]:
    """Find the fenced code blocks of Markdown, whole lines with their fences.

    As CommonMark has it: a block that is not closed goes on to the end. By markdown-it-py (MIT);
    raises Unavailable where it is not installed.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise _missing("code", "markdown-it-py") from None
    lines = [0, *(found.end() for found in LINE_END.finditer(text)), len(text)]
    blocks = [token.map for token in MarkdownIt().parse(text) if token.type == "fence"]
    return [(lines[block[0]], lines[min(block[1], len(lines) - 1)]) for block in blocks if block]


def json_values(text: str) -> list[Extent]:
    """Find the JSON objects and arrays that are not within another one, and not empty."""
    found: list[Extent] = []
    read, at = json.JSONDecoder().raw_decode, 0
    while opening := re.compile(r"[{\[]").search(text, at):
        start = at = opening.start()
        try:
            value, at = read(text, start)
        except (ValueError, RecursionError):  # no JSON, or nested too deeply to be any
            value = None
        if value:
            after = found[-1][1] if found else 0
            found.append((max(after, _before(text, start, BLANKS)), at))
        at = max(at, start + 1)
    return found


UNITS: dict[str, Splitter] = {
    "sentences": sentences,
    "paragraphs": paragraphs,
    "turns": turns,
    "code": code,
    "json": json_values,
}
"""How the units of each kind are found."""


def _cut(text: str, starts: Iterable[int]) -> list[Extent]:
    """Cut a whole text near ``starts``, where the next unit takes over."""
    if not text.strip():
        return []
    last = len(text.rstrip())
    seams = {_seam(text, at) for at in starts}
    return list(pairwise([0, *sorted(at for at in seams if 0 < at < last), len(text)]))


def _seam(text: str, at: int) -> int:
    """Return where one unit ends and the next begins, in the white space around ``at``."""
    first, last = _before(text, at), at
    while last < len(text) and text[last].isspace():
        last += 1
    return max(first, text.rfind("\n", first, last) + 1) if first else 0


def _before(text: str, at: int, blanks: Sequence[str] | None = None) -> int:
    """Return where the blanks that end at ``at`` begin; None: any white space."""
    while at and (text[at - 1].isspace() if blanks is None else text[at - 1] in blanks):
        at -= 1
    return at


def _missing(kind: str, package: str) -> Unavailable:
    return Unavailable(f"units of the kind {kind!r} need {package}; run: pip install {package}")
