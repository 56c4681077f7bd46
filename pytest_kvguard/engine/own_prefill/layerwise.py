"""Layer-wise token dropping at prefill: what a layer drops, the layers behind it never see.

A token's hidden state reaches others only through its keys and values. So a token is as good as
gone from the layers behind as soon as nobody there may look at it, and the model runs as always.
"""

import torch
from torch import Tensor

from pytest_kvguard.engine.attention import AttentionCall, attend, bias_of, visible
from pytest_kvguard.engine.grid import Cell, Prompt
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.rope import Rotation
from pytest_kvguard.engine.select import Kept, positions_of, repositioned
from pytest_kvguard.engine.stack import Known, Prefill
from pytest_kvguard.errors import Unsupported
from pytest_kvguard.policies.base import EMPTY
from pytest_kvguard.policies.check import checked_keep


def keep_layerwise(
    hook: AttentionHook,
    prompt: Prompt,
    cell: Cell,
    full: Prefill,
    rotation: Rotation | None = None,
) -> Kept:
    """Prefill what is compressed of a prompt, and drop between layers what the policy drops.

    full: the prefill without dropping. Raises Unsupported for a model with sliding layers, and
    what the policy and `checked_keep` raise.
    """
    policy, ids = cell.policy, prompt.ids[: prompt.compressed]
    if policy.needs_sums:
        raise Unsupported(
            f"{policy.name!r} drops tokens while it prefills, so attention is not summed over all "
            f"queries; combine it with a policy that needs no such sums"
        )
    layers = len(full.stack.layers)
    for layer in full.stack.layers.values():
        if layer.window is not None:
            raise Unsupported(
                f"layer {layer.layer} has sliding attention; {policy.name!r} can drop tokens "
                f"between layers only where all have full attention, so use another policy, such "
                f"as pyramidinfer_kv"
            )
    positions = torch.arange(len(ids), device=hook.device)
    protected = prompt.protection(policy, hook.device)
    turn = rotation.turn if rotation and policy.needs_turn else None
    alive = positions != EMPTY  # all of them
    held: list[tuple[Tensor, Tensor]] = []
    masks: list[Tensor] = []
    budgets: list[int] = []

    def drop(call: AttentionCall) -> Tensor:
        nonlocal alive
        device = call.query.device
        at, there = positions.to(device), alive.to(device)
        own = torch.eye(len(ids), dtype=torch.bool, device=device)
        # What is gone sees at least itself: nan from a query that sees nothing would spread.
        mask = visible(at.masked_fill(~there, EMPTY), at) | own
        bias = bias_of(mask, call.query.dtype)[None, None]
        seen = attend(call.query, call.key, call.value, bias, call.scoring)
        keys, values = call.key[0].contiguous(), call.value[0].contiguous()
        state = Known.of(prompt.about, protected, device).state(
            call,
            keys,
            values,
            call.query[0][:, -policy.window :],
            at=(len(held), layers),
            turn=turn,
            alive=there,
        )
        if len(held) % policy.reuse:
            masks.append(masks[-1].to(device))
        else:
            masks.append(checked_keep(policy, policy.importance(state), state, cell.ratio))
        budgets.append(policy.budget(state, cell.ratio))
        held.append((keys, values))
        alive = masks[-1].any(dim=0)
        return seen

    hook.prefill(torch.tensor([ids], device=hook.device), positions[None], drop)
    length = prompt.fed
    stays = torch.stack([mask[:, :length].to(hook.device) for mask in masks])
    counts = stays.sum(dim=-1).cpu()
    listed = positions_of(stays, int(counts.max()))
    own = []
    for index, pair in enumerate(held):
        at = listed[index, :, : int(counts[index].max())].to(pair[0].device).clamp(min=0)
        head = torch.arange(len(at), device=at.device)[:, None]
        own.append((pair[0][head, at], pair[1][head, at]))
    kept = Kept(full, length, listed, counts, tuple(budgets), tuple(own))
    return repositioned(kept, own, rotation) if policy.rerotate and rotation else kept
