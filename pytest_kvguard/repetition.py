"""Whether a model that decodes greedily goes round in a loop."""

from collections.abc import Sequence

LEAST = 256
"""Tokens that a loop must cover. Rules of dashes, rows of zeros and the digits of a googol are
shorter, even where each sign is a token."""

ROUNDS = 4
"""Rounds that a loop must have made: a text that is asked for three times is no loop."""

TAIL = 2048
"""Tokens that are looked at, so that loops of up to ``TAIL // ROUNDS`` tokens are found."""


def loops(tokens: Sequence[int]) -> bool:
    """Whether the newest tokens are the same ones over and over.

    True where they repeat with some period, without any change, for at least ROUNDS rounds and
    LEAST tokens. What counts on from round to round ("Answer_1: ...", "Answer_2: ...") has no
    period. Takes time proportional to the tail, at most TAIL tokens.

    A greedy model may in principle leave such a loop, for its positions still grow; here it is
    taken at its word, as vLLM does (``repetition_detection``).

    >>> loops([7, 8] * 128), loops([7, 8] * 127), loops(list(range(256)) * 3)
    (True, False, False)
    """
    newest = tokens[: -TAIL - 1 : -1]  # backwards, so that what repeats is at the front
    border = [0] * len(newest)  # of each prefix: the longest that it begins and ends with
    for length in range(2, len(newest) + 1):
        longest = border[length - 2]
        while longest and newest[longest] != newest[length - 1]:
            longest = border[longest - 1]
        longest += newest[longest] == newest[length - 1]
        border[length - 1] = longest
        if length >= LEAST and ROUNDS * (length - longest) <= length:  # period: length - longest
            return True
    return False
