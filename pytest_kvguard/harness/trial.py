"""Whether a model can do a task at all, from its first answers."""

import math
from collections.abc import Sequence
from typing import Any

MARGIN = 0.15
"""A baseline must be able to lie this far above chance for a loss to be seen on it."""

LEGIBLE = 0.9
"""A model must know this share of a task's tokens."""


def unreadable(prompts: Sequence[Sequence[int]], tokenizer: Any) -> str | None:
    """Say why a model cannot even read a task, or return None.

    prompts: token ids. Tokenizers that know every byte have no unknown tokens.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return None
    total = sum(len(ids) for ids in prompts)
    known = total - sum(list(ids).count(unknown) for ids in prompts)
    if known >= LEGIBLE * total:
        return None
    return (
        f"the model cannot read this task: its tokenizer knows {known / total:.0%} of the tokens; "
        f"use a model that reads ordinary text"
    )


def hopeless(marks: Sequence[float], chance: float) -> str | None:
    """Say why a task is beyond a model, or return None while that is not proved.

    marks: scores in [0, 1] of the first answers of the full cache. Hopeless is a model whose
    score, by the exact (Clopper-Pearson) upper bound at 95 %, lies less than MARGIN above what
    guessing scores. Fractional marks count by their whole sum.
    """
    from scipy.special import betaincinv  # costs start-up time, scipy.stats ten times as much

    right, n = math.floor(sum(marks)), len(marks)
    most = float(betaincinv(right + 1, n - right, 0.95)) if right < n else 1.0
    if most >= chance + MARGIN:
        return None
    above = f"{chance:.0%} by guessing" if chance else "nothing"
    return (
        f"the model is too weak for this task: with its full cache it gets {right} of {n} answers "
        f"right, at most {most:.0%} in the long run (95 %), against {above}; compression has "
        f"nothing to break, use a stronger model or an easier task"
    )
