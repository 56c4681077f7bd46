"""What a policy leaves of a prefill: gathered keys and values, so that memory is really freed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_kvguard.kv.prefill import HeldLayer, Prefill
from pytest_kvguard.kv.rope import Rotation
from pytest_kvguard.policies.base import EMPTY, LayerState, Policy
from pytest_kvguard.policies.check import checked_keep, checked_reuse


@dataclass(frozen=True)
class KeptLayer:
    """One layer after compression, in position order; every head keeps equally many."""

    layer: int
    keys: Tensor  # (Hkv, n, D)
    values: Tensor  # (Hkv, n, D)
    positions: Tensor  # (Hkv, n)
    sums: Tensor | None  # (Hkv, n) float32
    window: int | None
    budget: int  # positions a head of this layer was allowed, tokens to be fed again included

    @property
    def held(self) -> Tensor:
        """Positions held by each head, (Hkv,)."""
        return (self.positions != EMPTY).sum(dim=-1)

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def heads(self) -> tuple["KeptLayer", ...]:
        """Each head as a layer of its own, without copying."""
        return tuple(
            replace(
                self,
                keys=self.keys[head : head + 1],
                values=self.values[head : head + 1],
                positions=self.positions[head : head + 1],
                sums=None if self.sums is None else self.sums[head : head + 1],
            )
            for head in range(len(self.keys))
        )

    @property
    def padded(self) -> "KeptLayer":
        """The layer itself: there is nothing to pad."""
        return self


@dataclass(frozen=True)
class RaggedKept:
    """One layer whose heads keep different numbers, so that each has tensors of its own."""

    heads: tuple[KeptLayer, ...]  # one key/value head each

    @property
    def layer(self) -> int:
        """The model's index of the layer."""
        return self.heads[0].layer

    @property
    def window(self) -> int | None:
        """Positions a sliding layer sees."""
        return self.heads[0].window

    @property
    def budget(self) -> int:
        """Positions a head was allowed on average, tokens to be fed again included."""
        return self.heads[0].budget

    @property
    def held(self) -> Tensor:
        """Positions held by each head, (Hkv,)."""
        return torch.cat([head.held for head in self.heads])

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(head.bytes for head in self.heads)

    @property
    def padded(self) -> KeptLayer:
        """A copy as long as the fullest head; EMPTY behind what the others keep."""
        most = max(head.keys.shape[1] for head in self.heads)

        def joined(parts: Sequence[Tensor], empty: int = 0) -> Tensor:
            out = parts[0].new_full((len(parts), most, *parts[0].shape[2:]), empty)
            for head, part in enumerate(parts):
                out[head, : part.shape[1]] = part[0]
            return out

        sums = [head.sums for head in self.heads if head.sums is not None]
        return replace(
            self.heads[0],
            keys=joined([head.keys for head in self.heads]),
            values=joined([head.values for head in self.heads]),
            positions=joined([head.positions for head in self.heads], EMPTY),
            sums=joined(sums) if sums else None,
        )


AnyKept = KeptLayer | RaggedKept


@dataclass(frozen=True)
class Kept:
    """What is left of the first ``length`` positions of a prompt."""

    length: int
    layers: tuple[AnyKept, ...]

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
    layers: list[AnyKept] = []
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


def _gather(layer: HeldLayer, mask: Tensor, budget: int) -> AnyKept:
    counts = mask.sum(dim=-1).tolist()
    index = mask.int().argsort(dim=-1, descending=True, stable=True)  # kept ones first
    if len(set(counts)) == 1:
        return _pick(layer, slice(None), index[:, : counts[0]], budget)
    return RaggedKept(
        tuple(
            _pick(layer, slice(head, head + 1), index[head : head + 1, :count], budget)
            for head, count in enumerate(counts)
        )
    )


def _pick(layer: HeldLayer, heads: slice, index: Tensor, budget: int) -> KeptLayer:
    """Copy some heads' positions, (heads, n), and nothing else."""
    keys, values = layer.keys[heads], layer.values[heads]
    wide = index.unsqueeze(-1)
    sums = None
    if layer.sums is not None:
        by_head = layer.sums.unflatten(0, (len(layer.keys), -1)).sum(dim=1)  # (Hkv, T)
        sums = by_head[heads].gather(1, index)
    return KeptLayer(
        layer=layer.layer,
        keys=keys.gather(1, wide.expand(-1, -1, keys.shape[-1])),
        values=values.gather(1, wide.expand(-1, -1, values.shape[-1])),
        positions=index.clone(),
        sums=sums,
        window=None,
        budget=budget,
    )


def pack(kept: AnyKept, length: int, rotation: Rotation) -> AnyKept:
    """Turn each key to its distance from the end in the cache instead of in the prompt."""
    if isinstance(kept, RaggedKept):
        return RaggedKept(tuple(_turned(head, length, rotation) for head in kept.heads))
    return _turned(kept, length, rotation)


def _turned(kept: KeptLayer, length: int, rotation: Rotation) -> KeptLayer:
    held = kept.positions.shape[-1]
    packed = torch.arange(length - held, length, device=kept.positions.device)
    return replace(kept, keys=rotation.turn(kept.keys, packed - kept.positions))
