"""Policies that compress while a prefill of their own runs: one for each keep ratio."""

from pytest_kvguard.kv.compress import Kept
from pytest_kvguard.kv.foreign import keep_foreign
from pytest_kvguard.kv.grid import Cell, Prompt
from pytest_kvguard.kv.narrowing import narrow
from pytest_kvguard.kv.prefill import Prefill
from pytest_kvguard.kv.rope import Rotation
from pytest_kvguard.kv.seam import Seam
from pytest_kvguard.policies.base import Policy


def prefills_alone(policy: Policy) -> bool:
    """Whether what the policy keeps cannot be told from the prefill that others share."""
    return policy.narrows or policy.foreign is not None


def kept_alone(
    seam: Seam, prompt: Prompt, cell: Cell, full: Prefill, rotation: Rotation | None
) -> tuple[Kept, int]:
    """Prefill a prompt for one cell alone; also return how many prefills that took.

    ``full``: the prefill that others share.
    """
    if cell.policy.foreign is not None:
        return keep_foreign(seam, prompt, cell, full, rotation)
    return narrow(seam, prompt, cell, len(full.layers), rotation), 1


class OwnPrefills:
    """Runs prefills of single cells; prompts that are the same up to their question share them."""

    def __init__(self, seam: Seam) -> None:
        self.seam = seam
        self._context: object = None
        self._kept: dict[int, Kept] = {}  # by the cell's index, all of one context

    def kept(
        self, prompt: Prompt, index: int, cell: Cell, full: Prefill, rotation: Rotation | None
    ) -> tuple[Kept, int]:
        """Return what a cell keeps of a prompt, and how many prefills that took."""
        if not prompt.ahead:  # the question is among what is compressed
            return kept_alone(self.seam, prompt, cell, full, rotation)
        context = prompt.ids[: prompt.compressed], prompt.about, prompt.protected
        if self._context != context:
            self._context, self._kept = context, {}
        if index in self._kept:
            return self._kept[index], 0
        self._kept[index], prefills = kept_alone(self.seam, prompt, cell, full, rotation)
        return self._kept[index], prefills
