"""From a policy to the positions that are kept, in every layer and head."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pytest_kvguard.engine.rope import Rotation
from pytest_kvguard.engine.stack import Prefill, StackLayer
from pytest_kvguard.policies.base import EMPTY, LayerState, Policy
from pytest_kvguard.policies.check import checked_keep, checked_reuse


@dataclass(frozen=True)
class Kept:
    """What is left of the first ``length`` positions of a prompt, in its compressible layers.

    Nothing of it is copied: keys and values lie in the prefill's stack, but for those that a
    policy changed (``own``). Layers with sliding attention keep everything.
    """

    prefill: Prefill
    length: int
    positions: Tensor  # (layers, Hkv, n) ascending, EMPTY behind what heads with fewer keep
    held: Tensor  # (layers, Hkv) how many each head keeps, on the CPU
    budgets: tuple[int, ...]  # a layer's positions a head, tokens to be fed again included
    own: tuple[tuple[Tensor, Tensor], ...] | None = None  # keys, values (Hkv, n, D) of each layer

    @property
    def layers(self) -> tuple[StackLayer, ...]:
        """The compressible layers."""
        return self.prefill.stack.compressible

    @property
    def whole(self) -> bool:
        """Whether everything is kept as it lies in the stack."""
        return self.own is None and int(self.held.min()) == self.length

    def most(self, layer: int) -> int:
        """Positions that the fullest head of the compressible layer of this index keeps."""
        return int(self.held[layer].max())

    @cached_property
    def bytes(self) -> int:
        """Bytes of the keys and values held, in layers with sliding attention too."""
        return self.sliding_bytes + sum(
            layer.token_bytes * int(held.sum())
            for layer, held in zip(self.layers, self.held, strict=True)
        )

    @cached_property
    def padding(self) -> int:
        """Bytes that heads with fewer positions take, if all of a layer lie in one tensor."""
        return sum(
            layer.token_bytes * int(held.max() * len(held) - held.sum())
            for layer, held in zip(self.layers, self.held, strict=True)
        )

    @property
    def sliding_bytes(self) -> int:
        """Bytes of the keys and values that layers with sliding attention hold."""
        sliding = (x for x in self.prefill.stack.layers.values() if x.window is not None)
        return sum(
            layer.token_bytes * layer.keys.shape[1] * (self.length - behind_window(layer, self))
            for layer in sliding
        )

    def sums(self, layer: int) -> Tensor:
        """Attention each kept position of a layer was paid at prefill, (Hkv, n) float32."""
        at = self.positions[layer, :, : self.most(layer)]
        found = self.prefill.sums.get(self.layers[layer].layer)
        if found is None:
            raise AssertionError("a policy that accumulates must also ask for sums at prefill")
        by_head = found.unflatten(0, (len(at), -1)).sum(dim=1)  # (Hkv, T)
        return by_head.gather(1, at.to(by_head.device).clamp(min=0))


def behind_window(layer: StackLayer, kept: Kept) -> int:
    """Return the first position that a token after the kept ones sees in a sliding layer."""
    return 0 if layer.window is None else max(0, kept.length - layer.window + 1)


def importances(policy: Policy, states: Sequence[LayerState]) -> list[Tensor]:
    """Rate every position of every layer once; serves all keep ratios."""
    return [
        policy.importance(state) if index % policy.reuse == 0 else state.keys.new_empty(0)
        for index, state in enumerate(states)
    ]


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


def keep_all(prefill: Prefill, length: int) -> Kept:
    """Keep the first ``length`` positions of every layer."""
    layers = prefill.stack.compressible
    heads = layers[0].keys.shape[1]
    positions = torch.arange(length, device=layers[0].keys.device)
    held = torch.full((len(layers), heads), length)
    whole = positions.expand(len(layers), heads, -1)
    return Kept(prefill, length, whole, held, (length,) * len(layers))


def keep(
    prefill: Prefill,
    masks: Sequence[Tensor],
    budgets: Sequence[int],
    length: int,
    rotation: Rotation | None = None,
) -> Kept:
    """Keep what the masks say of the first ``length`` positions, without copying.

    masks: (Hkv, T) bool, and budgets: one for each compressible layer. Positions from ``length``
    on are left out because they are fed again. With a ``rotation``, keys move to their index in
    the cache, counted from the end, so that tokens that follow keep their own positions; these
    keys are copies.
    """
    home = masks[0].device  # of the positions; layers may lie elsewhere
    mask = torch.stack([mask[:, :length].to(home) for mask in masks])  # (layers, Hkv, T)
    held = mask.sum(dim=-1).cpu()
    kept = Kept(prefill, length, positions_of(mask, int(held.max())), held, tuple(budgets))
    if rotation is None:
        return kept
    pairs = [gather(layer, kept, index) for index, layer in enumerate(kept.layers)]
    return repositioned(kept, pairs, rotation)


def positions_of(mask: Tensor, most: int) -> Tensor:
    """List the marked positions in order: (..., T) bool -> (..., most), EMPTY behind fewer."""
    rank = mask.cumsum(dim=-1) - 1
    at = torch.arange(mask.shape[-1], device=mask.device).expand_as(rank)
    out = rank.new_full((*mask.shape[:-1], most + 1), EMPTY)
    return out.scatter_(-1, rank.masked_fill(~mask, most), at)[..., :most]


def gather(layer: StackLayer, kept: Kept, index: int) -> tuple[Tensor, Tensor]:
    """Copy what is kept of a compressible layer: keys and values, (Hkv, n, D) each."""
    if kept.own is not None:
        return kept.own[index]
    at = kept.positions[index, :, : kept.most(index)].to(layer.keys.device).clamp(min=0)
    head = torch.arange(len(at), device=at.device)[:, None]
    slot = kept.prefill.slot
    return layer.keys[slot, head, at], layer.values[slot, head, at]


def repositioned(kept: Kept, pairs: Sequence[tuple[Tensor, Tensor]], rotation: Rotation) -> Kept:
    """Rotate keys to their distance from the end in the cache instead of in the prompt.

    pairs: the keys and values of each layer, (Hkv, n, D) each, in the order of `Kept.positions`.
    """
    own = []
    for index, (keys, values) in enumerate(pairs):
        at = kept.positions[index, :, : keys.shape[1]].to(keys.device)
        held = kept.held[index, :, None].to(keys.device)
        packed = kept.length - held + torch.arange(at.shape[1], device=keys.device)
        own.append((rotation.turn(keys, packed - at), values))
    return Kept(kept.prefill, kept.length, kept.positions, kept.held, kept.budgets, tuple(own))
