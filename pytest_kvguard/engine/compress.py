"""What cells keep of a prompt: a policy rates its positions once, whatever the keep ratios."""

from torch import Tensor

from pytest_kvguard.engine.grid import Cell
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.own_prefill import OwnPrefills, prefills_alone
from pytest_kvguard.engine.requests import Draft, HeldPrompt, Request
from pytest_kvguard.engine.select import importances, keep, keep_masks
from pytest_kvguard.policies.base import LayerState, Policy


class Compressor:
    """Chooses what cells keep of one prompt."""

    def __init__(self, hook: AttentionHook, held: HeldPrompt, own: OwnPrefills) -> None:
        self.hook, self.held, self.own = hook, held, own
        self._rated: dict[int, tuple[list[Tensor], tuple[LayerState, ...]]] = {}  # by policy

    def request(self, draft: Draft, index: int, cell: Cell) -> Request:
        """Compress the prompt for a cell, the ``index``-th of a grid.

        Raises Refused where the budget cannot hold what must stay, Unsupported where policy and
        model do not fit, and whatever the policy raises.
        """
        held, policy = self.held, cell.policy
        rotation = self.hook.rotation() if policy.needs_turn or policy.rerotate else None
        rerotation = rotation if policy.rerotate else None
        if prefills_alone(policy):
            kept = self.own.kept(held.prompt, index, cell, held.prefill, rotation)
        else:
            ratings, states = self._rate(policy)
            masks = keep_masks(policy, ratings, states, cell.ratio)
            budgets = [policy.budget(state, cell.ratio) for state in states]
            kept = keep(held.prefill, masks, budgets, held.prompt.fed, rerotation)
        return Request(held, draft, index, cell, kept, rerotation)

    def _rate(self, policy: Policy) -> tuple[list[Tensor], tuple[LayerState, ...]]:
        if id(policy) not in self._rated:
            mask = self.held.prompt.protection(policy, self.hook.device)
            turn = self.hook.rotation().turn if policy.needs_turn else None
            states = self.held.prefill.states(self.held.prompt.about, mask, turn)
            self._rated[id(policy)] = importances(policy, states), states
        return self._rated[id(policy)]
