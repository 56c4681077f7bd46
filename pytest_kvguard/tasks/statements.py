"""Sentences that say what the answer is."""

import re
from collections.abc import Iterator
from itertools import zip_longest
from typing import NamedTuple

_SAYS = re.compile(
    r"""(?: <answer>
    | ^ [ \t#]* (?:the\s)? (?:final\s)? answer [ \t]* \n  # a heading
    | \b (?:answer|option|choice) \b
      (?: \s+ (?:to|for|in|of|here|then|thus|therefore) \b [^.,:;!?\n]{0,80}? )?
      \s* (?: \b (?: is | was | are | equals | (?:would|should|must|will)\ be ) \b \s* [:=]?
            | [:=] )
    ) \s*
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_SUPPOSED = re.compile(
    r"\b(?:if|whether|unless|suppose|supposing|assume|assuming|imagine)"
    r"(?:\s+that)?(?:\s+(?:the|my|your|our))?(?:\s+\w+)?\s+$",
    re.IGNORECASE,
)
_DENIED = re.compile(r"not\b", re.IGNORECASE)
_END = re.compile(r"(?P<asked>\?)|[.!](?=[\s\"')\]]|$)|\n|</answer>")


class Statement(NamedTuple):
    """What a text says its answer is, from character ``start`` on, to the end of the sentence."""

    start: int
    text: str


def statements(text: str) -> Iterator[Statement]:
    """Yield what follows each "the answer is", to the end of its sentence or to the next of them.

    What is denied, asked or only supposed states nothing.

    >>> text = "The answer is not 5. If the answer is 6? The answer is: 18, as said. Done."
    >>> [statement.text for statement in statements(text)]
    ['18, as said']
    """
    said = list(_SAYS.finditer(text))
    for match, following in zip_longest(said, said[1:]):
        start, last = match.end(), following.start() if following else len(text)
        if _SUPPOSED.search(text[max(0, match.start() - 40) : match.start()]):
            continue
        if _DENIED.match(text, start):
            continue
        end = _END.search(text, start, last)
        if end is None or not end["asked"]:
            yield Statement(start, text[start : end.start() if end else last])
