"""What a policy leaves of a prefill: gathered keys and values, so that memory is really freed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kvguard.kv.prefill import HeldLayer, Prefill
from pytest_kvguard.kv.rope import Rotation
from pytest_kvguard.policies.base import EMPTY, LayerState, Policy
from pytest_kvguard.policies.check import checked_keep, checked_reuse


@dataclass(frozen=True)
class KeptLayer:
    """One layer after compression, in position order; heads may keep different counts.

    The tensors are as long as the fullest head: a shorter one is padded with EMPTY positions.
    """

    layer: int
    keys: Tensor  # (Hkv, n, D)
    values: Tensor  # (Hkv, n, D)
    positions: Tensor  # (Hkv, n), EMPTY behind what a head kept
    sums: Tensor | None  # (Hkv, n) float32
    window: int | None
    budget: int  # positions a head of this layer was allowed, tokens to be fed again included

    @property
    def held(self) -> Tensor:
        """Positions held by each head, (Hkv,)."""
        return (self.positions != EMPTY).sum(dim=-1)

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values held; what pads shorter heads is not counted."""
        token = (self.keys.shape[-1] + self.values.shape[-1]) * self.keys.element_size()
        return int(self.held.sum()) * token


@dataclass(frozen=True)
class Kept:
    """What is left of the first ``length`` positions of a prompt."""

    length: int
    layers: tuple[KeptLayer, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values held, in compressible layers and others."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def held(self) -> Tensor:
        """Positions held by each head of each compressible layer, (layers, Hkv)."""
        return torch.stack([layer.held for layer in self.layers if layer.window is None])


def keep_masks(
    policy: Policy,
    importances: Sequence[Tensor],
    states: Sequence[LayerState],
    ratio: float,
) -> list[Tensor]:
    """Select in every compressible layer: a list of (Hkv, T) bool.

    Layers that reuse an earlier one's selection get the very same mask.
    """
    masks: list[Tensor] = []
    for index, (importance, state) in enumerate(zip(importances, states, strict=True)):
        if index % policy.reuse:
            masks.append(checked_reuse(policy, masks[-1], state, ratio))
        else:
            masks.append(checked_keep(policy, importance, state, ratio))
    return masks


def importances(policy: Policy, states: Sequence[LayerState]) -> list[Tensor]:
    """Rate every position of every layer once; serves all keep ratios."""
    return [
        policy.importance(state) if index % policy.reuse == 0 else state.keys.new_empty(0)
        for index, state in enumerate(states)
    ]


def keep_all(prefill: Prefill, length: int) -> Kept:
    """Keep the first ``length`` positions of every layer, without copying."""
    return Kept(length, tuple(_all(layer, length) for layer in prefill.layers))


def keep(
    prefill: Prefill,
    masks: Sequence[Tensor],
    budgets: Sequence[int],
    length: int,
    rotation: Rotation | None = None,
) -> Kept:
    """Gather what the masks keep of the first ``length`` positions.

    masks, budgets: one for each compressible layer. Positions from ``length`` on are left out
    because they are fed again. With a ``rotation``, keys move to their index in the cache, counted
    from the end, so that tokens that follow keep their own positions.
    """
    chosen = iter(zip(masks, budgets, strict=True))
    layers = []
    for layer in prefill.layers:
        if layer.window is not None:
            layers.append(_all(layer, length))
            continue
        mask, budget = next(chosen)
        kept = _gather(layer, mask[:, :length], budget)
        layers.append(kept if rotation is None else pack(kept, length, rotation))
    return Kept(length, tuple(layers))


def _all(layer: HeldLayer, length: int) -> KeptLayer:
    start = 0 if layer.window is None else max(0, length - layer.window + 1)
    positions = torch.arange(start, length, device=layer.keys.device)
    return KeptLayer(
        layer=layer.layer,
        keys=layer.keys[:, start:length],
        values=layer.values[:, start:length],
        positions=positions.expand(layer.keys.shape[0], -1),
        sums=None,
        window=layer.window,
        budget=length,
    )


def _gather(layer: HeldLayer, mask: Tensor, budget: int) -> KeptLayer:
    count = mask.sum(dim=-1, keepdim=True)  # (Hkv, 1)
    n = int(count.max()) if mask.shape[-1] else 0
    index = mask.int().argsort(dim=-1, descending=True, stable=True)[:, :n]  # kept ones first
    wide = index.unsqueeze(-1).expand(-1, -1, layer.keys.shape[-1])
    filled = torch.arange(n, device=mask.device) < count
    sums = None
    if layer.sums is not None:
        by_head = layer.sums.unflatten(0, (mask.shape[0], -1)).sum(dim=1)  # (Hkv, T)
        sums = by_head.gather(1, index)
    return KeptLayer(
        layer=layer.layer,
        keys=layer.keys.gather(1, wide),
        values=layer.values.gather(1, index.unsqueeze(-1).expand(-1, -1, layer.values.shape[-1])),
        positions=torch.where(filled, index, EMPTY),
        sums=sums,
        window=None,
        budget=budget,
    )


def pack(kept: KeptLayer, length: int, rotation: Rotation) -> KeptLayer:
    """Turn each key to its distance from the end in the cache instead of in the prompt."""
    rank = torch.arange(kept.positions.shape[-1], device=kept.positions.device)
    packed = length - kept.held.unsqueeze(-1) + rank  # (Hkv, n)
    moved = torch.where(kept.positions == EMPTY, 0, packed - kept.positions)
    return KeptLayer(
        layer=kept.layer,
        keys=rotation.turn(kept.keys, moved),
        values=kept.values,
        positions=kept.positions,
        sums=kept.sums,
        window=kept.window,
        budget=kept.budget,
    )
