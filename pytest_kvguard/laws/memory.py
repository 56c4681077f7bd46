"""Whether a policy remembers: ordinary prompts before any other, and again after all others.

What remembers may be full after a dozen calls, and what it remembers of tiny prompts need not show.
So the first prompts a policy sees are ordinary ones: A, B, A again. They come back when all laws
were tried. Where policies can be made anew, each is also asked of one that has seen nothing.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pytest_kvguard.errors import Refused
from pytest_kvguard.laws.answer import Step, answer, evicting, left
from pytest_kvguard.laws.prefill import differs
from pytest_kvguard.laws.traces import copied
from pytest_kvguard.policies.base import LayerState, Policy

RATIOS = (0.9, 0.5, 0.25)

LONG_ANSWER = 48
"""Tokens of an ordinary answer, past the windows of a policy of ours (SCOPE's `window`)."""

ANSWER_RATIOS = (0.8, 0.3)
"""Of the first prompt and of the second: most that is new stays, and most goes."""

Maker = Callable[[], Policy]


class Memory:
    """What a policy chose of ordinary prompts the first time, and what it chooses later."""

    def __init__(self, make: Maker, used: Policy, prompts: Sequence[LayerState]) -> None:
        self.make = make
        self.used = used
        self.prompts = prompts
        self.masks = dict[int, list[Tensor | None]]()
        self.answers = dict[int, list[Step]]()

    def of_prompts(self) -> str:
        """Say how a selection depends on the prompts before, A, B, A again; "" if none does."""
        for later in range(len(self.prompts)):
            for index in (later, 0):
                if problem := self._selects_as_before(index):
                    return problem
        return self.of_prompts_anew()

    def of_prompts_anew(self) -> str:
        """Ask for every selection again, the last prompt first, and for that of a new policy."""
        for index in reversed(range(len(self.prompts))):
            if problem := self._selects_as_before(index):
                return problem
            anew = _selections(self.make(), self.prompts[index])
            if problem := _differ(self.masks[index], anew, "than one that is made anew"):
                return problem
        return ""

    def of_steps(self) -> str:
        """Say how an answer depends on the ones before; "" if none does."""
        for index in (0, 1, 0):
            if problem := self._answers_as_before(index, self.used, "after another answer"):
                return problem
        return self.of_steps_anew()

    def of_steps_anew(self) -> str:
        """Ask for both answers again, for each step alone, the last first, and of a new policy."""
        for index in (1, 0):
            if problem := self._answers_as_before(index, self.used, "after another answer"):
                return problem
            if problem := self._answers_as_before(index, self.make(), "than one made anew"):
                return problem
            for step in reversed(self.answers[index]):
                after = left(evicting(self.used), copied(step.before))
                if not torch.equal(after.positions, step.after.positions):
                    return "chose otherwise when steps came in another order"
        return ""

    def _selects_as_before(self, index: int) -> str:
        masks = _selections(self.used, self.prompts[index])
        return _differ(self.masks.setdefault(index, masks), masks, "after another prompt")

    def _answers_as_before(self, index: int, policy: Policy, when: str) -> str:
        again = list(answer(policy, copied(self.prompts[index]), ANSWER_RATIOS[index], LONG_ANSWER))
        first = self.answers.setdefault(index, again)
        if len(first) != len(again):
            return f"ended after {len(again)} tokens, not {len(first)}, {when}"
        for count, steps in enumerate(zip(first, again, strict=True)):
            if not torch.equal(*(step.after.positions for step in steps)):
                return f"chose otherwise {when}, {count} tokens after the prompt"
        return ""


def _selections(policy: Policy, prompt: LayerState) -> list[Tensor | None]:
    """Rate a prompt once and select at every ratio, as the engine does."""
    prompt = copied(prompt)  # what a policy does to it is another law's business
    importance = policy.importance(prompt)
    masks: list[Tensor | None] = []
    for ratio in RATIOS:
        try:
            masks.append(policy.select(importance, policy.budget(prompt, ratio), prompt))
        except Refused:
            masks.append(None)
    return masks


def _differ(first: list[Tensor | None], again: list[Tensor | None], when: str) -> str:
    problems = (differs(one, other, when) for one, other in zip(first, again, strict=True))
    return next(filter(None, problems), "")
