"""Policies that compress while a prefill of their own runs: one for each keep ratio."""

from pytest_kvguard.engine.grid import Cell, Prompt
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.own_prefill.layerwise import keep_layerwise
from pytest_kvguard.engine.own_prefill.third_party import keep_third_party
from pytest_kvguard.engine.rope import Rotation
from pytest_kvguard.engine.select import Kept
from pytest_kvguard.engine.stack import Prefill
from pytest_kvguard.policies.base import Policy


def prefills_alone(policy: Policy) -> bool:
    """Whether what the policy keeps cannot be told from the prefill that others share."""
    return policy.narrows or policy.foreign is not None


def kept_alone(
    hook: AttentionHook, prompt: Prompt, cell: Cell, full: Prefill, rotation: Rotation | None
) -> Kept:
    """Prefill a prompt for one cell alone. ``full``: the prefill that others share."""
    if cell.policy.foreign is not None:
        return keep_third_party(hook, prompt, cell, full, rotation)
    return keep_layerwise(hook, prompt, cell, full, rotation)


class OwnPrefills:
    """Runs prefills of single cells; prompts that are the same up to their question share them."""

    def __init__(self, hook: AttentionHook) -> None:
        self.hook = hook
        self._context: object = None
        self._kept: dict[int, Kept] = {}  # by the cell's index, all of one context

    def kept(
        self, prompt: Prompt, index: int, cell: Cell, full: Prefill, rotation: Rotation | None
    ) -> Kept:
        """Return what a cell keeps of a prompt."""
        if not prompt.ahead:  # the question is among what is compressed
            return kept_alone(self.hook, prompt, cell, full, rotation)
        context = prompt.ids[: prompt.compressed], prompt.about, prompt.protected
        if self._context != context:
            self._context, self._kept = context, {}
        if index not in self._kept:
            self._kept[index] = kept_alone(self.hook, prompt, cell, full, rotation)
        return self._kept[index]
