"""A prefill that narrows: what a layer drops, the layers behind it never see.

A token's hidden state reaches others only through its keys and values. So a token is as good as
gone from the layers behind as soon as nobody there may look at it, and the model runs as always.
"""

import torch
from torch import Tensor

from pytest_kvguard.errors import Unsupported
from pytest_kvguard.kv.attention import attend, visible
from pytest_kvguard.kv.compress import Kept, keep
from pytest_kvguard.kv.grid import Cell, Prompt
from pytest_kvguard.kv.prefill import HeldLayer, Prefill, state_of
from pytest_kvguard.kv.rope import Rotation
from pytest_kvguard.kv.seam import Seam, Step
from pytest_kvguard.policies.base import EMPTY
from pytest_kvguard.policies.check import checked_keep


def narrow(
    seam: Seam, prompt: Prompt, cell: Cell, layers: int, rotation: Rotation | None = None
) -> Kept:
    """Prefill what is compressed of a prompt, and drop between layers what the policy drops.

    layers: how many the model has. Raises Unsupported for a model with sliding layers, and what
    the policy and `checked_keep` raise.
    """
    policy, ids = cell.policy, prompt.ids[: prompt.compressed]
    if policy.needs_sums:
        raise Unsupported(
            f"{policy.name!r} drops tokens while it prefills, so attention is not summed over all "
            f"queries; combine it with a policy that needs no such sums"
        )
    positions = torch.arange(len(ids), device=seam.device)
    protected = prompt.protection(policy, seam.device)
    turn = rotation.turn if rotation and policy.needs_turn else None
    alive = positions != EMPTY  # all of them
    held: list[HeldLayer] = []
    masks: list[Tensor] = []
    budgets: list[int] = []

    def drop(step: Step) -> Tensor:
        nonlocal alive
        layer = _held(step, policy.window)
        own = torch.eye(len(ids), dtype=torch.bool, device=seam.device)
        # What is gone sees at least itself: nan from a query that sees nothing would spread.
        mask = visible(torch.where(alive, positions, EMPTY), positions) | own
        seen = attend(step.query, step.key, step.value, mask[None, None], step.scaling)
        state = state_of(layer, len(held), layers, prompt.about, protected, turn, alive)
        if len(held) % policy.reuse:
            masks.append(masks[-1])
        else:
            masks.append(checked_keep(policy, policy.importance(state), state, cell.ratio))
        budgets.append(policy.budget(state, cell.ratio))
        held.append(layer)
        alive = masks[-1].any(dim=0)
        return seen

    seam.forward(torch.tensor([ids], device=seam.device), positions[None], drop, last=1)
    whole = Prefill(ids, tuple(held))
    return keep(whole, masks, budgets, prompt.fed, rotation if policy.rerotate else None).owned


def _held(step: Step, window: int) -> HeldLayer:
    if step.window is not None:
        raise Unsupported(
            f"layer {step.layer} has sliding attention; tokens can be dropped between layers only "
            f"where all have full attention, so use another policy, such as pyramidinfer_kv"
        )
    return HeldLayer(
        layer=step.layer,
        keys=step.key[0].contiguous(),
        values=step.value[0].contiguous(),
        queries=step.query[0, :, -window:],
        sums=None,
        scaling=step.scaling,
        window=None,
        output=step.output,
    )
