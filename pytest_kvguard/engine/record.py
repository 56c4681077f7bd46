"""What outcomes are told: answers, what was held for them, what they cost, and what failed."""

from collections.abc import Sequence
from time import perf_counter

from torch import Tensor

from pytest_kvguard.engine.grid import Answer, Grid, Outcome, Prompt
from pytest_kvguard.engine.requests import HeldPrompt
from pytest_kvguard.engine.select import Kept


def fail(grid: Grid, where: Sequence[tuple[int, int]], problem: BaseException) -> None:
    """Note the first prompt that each cell failed on; its other prompts are not tried.

    where: indices of cells, and of the prompts they failed on.
    """
    for cell, prompt in where:
        outcome = grid.cells[cell]
        if outcome.problem is None:
            outcome.problem = prompt, f"{type(problem).__name__}: {problem}"


def record(
    outcome: Outcome, held: HeldPrompt, kept: Kept, answer: Answer, stored: int | None = None
) -> None:
    """Add one prompt's answer to an outcome.

    kept: what its row began with; stored: bytes of that in compressible layers, where it is stored
    as codes.
    """
    outcome.answers[held.index] = answer
    outcome.held.append(share_held(kept, held.prompt))
    outcome.bytes_full += held.full.bytes
    outcome.bytes_held += kept.bytes if stored is None else stored + kept.sliding_bytes
    outcome.bytes_padding += kept.padding if stored is None else 0
    outcome.tokens += answer.fed


def share_held(kept: Kept, prompt: Prompt) -> Tensor:
    """Fraction of what is compressed that each head holds, (layers, Hkv) float64.

    With the tokens of the prompt that are fed again.
    """
    again = prompt.compressed - prompt.fed
    return (kept.held.double() + again) / prompt.compressed


class Meter:
    """Shares out among cells what is spent from its making on."""

    def __init__(self) -> None:
        self.started = perf_counter()

    def note(self, grid: Grid, rows: Sequence[tuple[int, Answer, int, int]]) -> None:
        """Add passes and seconds to the cells' outcomes; seconds are shared by tokens.

        rows: a cell's index, an answer, and its passes and tokens before.
        """
        spent = [(cell, a.forwards - passes, a.fed - fed) for cell, a, passes, fed in rows]
        second = (perf_counter() - self.started) / max(1, sum(fed for _, _, fed in spent))
        for cell in {cell for cell, _, _ in spent}:
            mine = [(passes, fed) for one, passes, fed in spent if one == cell]
            grid.cells[cell].forwards += max(passes for passes, _ in mine)
            grid.cells[cell].seconds += second * sum(fed for _, fed in mine)
