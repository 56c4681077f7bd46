"""Where a reply ends: at a stop string, or where a base model invents the next question."""

import re
from collections.abc import Sequence

_HEAD = re.compile(
    r"^[ \t>*_]*(?:"
    r"(?:Q|Question|Problem|Exercise|User|Human|Instruction)[ _]?[0-9]*[*_]{0,2}[ \t]*:"
    r"|\#{1,6}[ \t]*(?:Question|Problem|Exercise|Instruction|User|Human)\b"
    r"|<\|im_start\|>|<\|start_header_id\|>|<\|user\|>|<start_of_turn>|\[INST\]"
    r")",
    re.MULTILINE | re.IGNORECASE,
)


def turns(text: str) -> list[str]:
    r"""Split a reply before each line that begins another question; the first turn is its answer.

    >>> turns("It is 18.\n\nQ: And now?\nA: 7")
    ['It is 18.\n\n', 'Q: And now?\nA: 7']
    """
    starts = [match.start() for match in _HEAD.finditer(text) if text[: match.start()].strip()]
    return [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True)]


def cut_at_stop(text: str, strings: Sequence[str]) -> str:
    r"""Return a text up to the first of the stop strings in it.

    Meant for the answer alone: a stop string inside a reasoning trace stops nothing.

    >>> cut_at_stop("18\n\nQ: And", ("Q:", "\n\n"))
    '18'
    """
    return text[: min((at for string in strings if (at := text.find(string)) >= 0), default=None)]
