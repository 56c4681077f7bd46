"""Whether a model can do a task at all, from its answers so far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from pytest_kvguard.harness.stats import FEWEST_ABOVE_CHANCE

MARGIN = 0.15
"""A baseline must be able to lie this far above chance for a loss to be seen on it."""

LEGIBLE = 0.9
"""A model must know this share of a task's tokens."""

ERROR = 0.05
"""How often, at the most, a model that is good enough is given up, however often one looks."""

STAKES = ((1.0, 0.5), *((tenths / 10, 0.5 / 9) for tenths in range(1, 10)))
"""Share of the wealth that is staked on each answer, and the share of the wealth that plays so.
All of it wins fastest against a model that gets nothing right, which should be given up first."""


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


@dataclass(frozen=True)
class Futility:
    """When to give up on a baseline: as soon as its answers prove that it is too weak.

    samples: how many the run has, at least 1; chance: what guessing scores, in [0, 1).

    The test may be made after any number of answers, as often as one likes, and gives up on a
    model whose score is at ``floor`` or above with a probability of at most ERROR. It bets against
    the claim "the mean mark is m or more": a bettor who stakes a share c of his wealth on each
    answer multiplies it by 1 + c (m - mark) / (1 - m), which is never negative, and if the claim
    is true no more than 1 on average. So his wealth exceeds 1 / ERROR with a probability of at
    most ERROR, ever (Ville's inequality), for marks anywhere in [0, 1], not only 0 and 1.
    Assumes that samples come in an order that does not depend on their difficulty.

    Waudby-Smith and Ramdas, 2024, Estimating means of bounded random variables by betting,
    https://doi.org/10.1093/jrsssb/qkad009
    """

    samples: int
    chance: float = 0.0

    @property
    def floor(self) -> float:
        """The score from which this many samples can show a loss; 1 or more: nothing can."""
        return self.chance + max(MARGIN, FEWEST_ABOVE_CHANCE / self.samples)

    @property
    def first_look(self) -> int:
        """How many answers prove it when all are wrong; ``samples`` where so few never do."""
        if self.floor >= 1:
            return self.samples
        enough = (n for n in count(1) if _disproved([0.0] * n, self.floor))
        return min(next(enough), self.samples)

    def reason(self, marks: Sequence[float]) -> str | None:
        """Say why to give up, or return None while nothing is proved.

        marks: in [0, 1], of the answers of the full cache so far, in the order of the samples.
        """
        if self.floor >= 1 or not _disproved(marks, self.floor):
            return None
        above = f"{self.chance:.0%} by guessing" if self.chance else "nothing"
        return (
            f"the model is too weak for this task: with its full cache it gets "
            f"{math.fsum(marks):.3g} of {len(marks)} answers right, at most {_most(marks):.1%} in "
            f"the long run (95 %), against {above}; {self.samples} samples show a loss only from "
            f"{self.floor:.1%} up; compression has nothing to break, use a stronger model or an "
            f"easier task"
        )


def _disproved(marks: Sequence[float], mean: float) -> bool:
    """Whether marks disprove that their mean is at least ``mean``, in (0, 1)."""
    stakes, shares = np.array(STAKES).T
    gains = (mean - np.asarray(marks, dtype=float)) / (1 - mean)  # of a stake, at least -1
    with np.errstate(divide="ignore"):  # who staked all and lost it has nothing for good
        logs = np.log(np.maximum(1 + np.outer(stakes, gains), 0)).sum(axis=1)
    most = logs.max()  # taken out, for wealth grows beyond what a float can hold
    return bool(most + np.log(shares @ np.exp(logs - most)) >= -math.log(ERROR))


def _most(marks: Sequence[float]) -> float:
    """Return the highest mean that marks do not disprove: wealth grows with the mean."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if _disproved(marks, middle) else (middle, high)
    return high
