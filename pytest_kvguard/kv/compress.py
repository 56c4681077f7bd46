"""What a policy leaves of a prefill: where it lies, or copies of it that free the rest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_kvguard.kv.prefill import HeldLayer, Prefill
from pytest_kvguard.kv.rope import Rotation
from pytest_kvguard.policies.base import EMPTY, LayerState, Policy
from pytest_kvguard.policies.check import checked_keep, checked_reuse


@dataclass(frozen=True)
class Source:
    """Where what is kept of a layer lies."""

    keys: Tensor  # (Hkv, T, D)
    values: Tensor  # (Hkv, T, D)
    sums: Tensor | None = None  # (Hkv or Hq, T) float32

    def head(self, at: int) -> "Source":
        """One key/value head of it, without copying."""
        sums = self.sums
        if sums is not None:
            sums = sums.unflatten(0, (len(self.keys), -1))[at]
        return Source(self.keys[at : at + 1], self.values[at : at + 1], sums)


@dataclass(frozen=True)
class KeptLayer:
    """One layer after compression, in position order; every head keeps equally many.

    Nothing of it is copied before somebody asks for ``keys`` or ``values``.
    """

    layer: int
    source: Source
    index: Tensor | None  # (Hkv, n) where in the source; None: all of it, in order
    positions: Tensor  # (Hkv, n)
    window: int | None
    budget: int  # positions a head of this layer was allowed, tokens to be fed again included

    @property
    def keys(self) -> Tensor:
        """(Hkv, n, D)."""
        return picked(self.source.keys, self.index)

    @property
    def values(self) -> Tensor:
        """(Hkv, n, D)."""
        return picked(self.source.values, self.index)

    @property
    def places(self) -> Tensor:
        """Where in the source it lies, (Hkv, n)."""
        if self.index is not None:
            return self.index
        return torch.arange(self.positions.shape[1], device=self.positions.device).expand_as(
            self.positions
        )

    @property
    def sums(self) -> Tensor | None:
        """Attention each position was paid at prefill, (Hkv, n) float32."""
        if self.source.sums is None:
            return None
        by_head = self.source.sums.unflatten(0, (len(self.positions), -1)).sum(dim=1)
        return picked(by_head, self.index)

    @property
    def held(self) -> Tensor:
        """Positions held by each head, (Hkv,)."""
        return (self.positions != EMPTY).sum(dim=-1)

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values."""
        keys, values = self.source.keys, self.source.values
        return self.positions.numel() * sum(
            part.shape[-1] * part.element_size() for part in (keys, values)
        )

    @property
    def heads(self) -> tuple["KeptLayer", ...]:
        """Each head as a layer of its own, without copying."""
        return tuple(
            replace(
                self,
                source=self.source.head(at),
                index=None if self.index is None else self.index[at : at + 1],
                positions=self.positions[at : at + 1],
            )
            for at in range(len(self.positions))
        )

    @property
    def padded(self) -> "KeptLayer":
        """The layer itself: there is nothing to pad."""
        return self

    @property
    def owned(self) -> "KeptLayer":
        """A copy of what is kept, so that the source can be let go of."""
        if self.index is None:
            return self
        return replace(self, source=Source(self.keys, self.values, self.sums), index=None)


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
        most = max(head.positions.shape[1] for head in self.heads)

        def joined(parts: Sequence[Tensor], empty: int = 0) -> Tensor:
            out = parts[0].new_full((len(parts), most, *parts[0].shape[2:]), empty)
            for head, part in enumerate(parts):
                out[head, : part.shape[1]] = part[0]
            return out

        sums = [head.sums for head in self.heads if head.sums is not None]
        source = Source(
            keys=joined([head.keys for head in self.heads]),
            values=joined([head.values for head in self.heads]),
            sums=joined(sums) if sums else None,
        )
        positions = joined([head.positions for head in self.heads], EMPTY)
        return replace(self.heads[0], source=source, index=None, positions=positions)

    @property
    def owned(self) -> "RaggedKept":
        """A copy of what is kept, so that the source can be let go of."""
        return RaggedKept(tuple(head.owned for head in self.heads))


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

    @property
    def owned(self) -> "Kept":
        """A copy of what is kept, so that the prefill can be let go of."""
        return replace(self, layers=tuple(layer.owned for layer in self.layers))


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
    """Keep what the masks say of the first ``length`` positions, without copying.

    masks, budgets: one for each compressible layer. Positions from ``length`` on are left out
    because they are fed again. With a ``rotation``, keys move to their index in the cache, counted
    from the end, so that tokens that follow keep their own positions; these keys are copies.
    """
    chosen = iter(zip(masks, budgets, strict=True))
    layers: list[AnyKept] = []
    for layer in prefill.layers:
        if layer.window is not None:
            layers.append(_all(layer, length))
            continue
        mask, budget = next(chosen)
        kept = _pick(layer, mask[:, :length], budget)
        layers.append(kept if rotation is None else pack(kept, length, rotation))
    return Kept(length, tuple(layers))


def _all(layer: HeldLayer, length: int) -> KeptLayer:
    start = 0 if layer.window is None else max(0, length - layer.window + 1)
    positions = torch.arange(start, length, device=layer.keys.device)
    return KeptLayer(
        layer=layer.layer,
        source=Source(layer.keys[:, start:length], layer.values[:, start:length]),
        index=None,
        positions=positions.expand(layer.keys.shape[0], -1),
        window=layer.window,
        budget=length,
    )


def _pick(layer: HeldLayer, mask: Tensor, budget: int) -> AnyKept:
    source = Source(layer.keys, layer.values, layer.sums)
    heads, at = mask.nonzero(as_tuple=True)
    counts = heads.bincount(minlength=len(mask)).tolist()

    def kept(source: Source, index: Tensor) -> KeptLayer:
        return KeptLayer(layer.layer, source, index, index, window=None, budget=budget)

    if len(set(counts)) == 1:
        return kept(source, at.view(len(counts), -1))
    parts = enumerate(at.split(counts))
    return RaggedKept(tuple(kept(source.head(head), index[None]) for head, index in parts))


def picked(held: Tensor, index: Tensor | None) -> Tensor:
    """Copy each head's positions: (Hkv, T, ...), (Hkv, n) -> (Hkv, n, ...); None: all, uncopied."""
    if index is None:
        return held
    heads, length = held.shape[:2]
    flat = index + length * torch.arange(heads, device=index.device).unsqueeze(-1)
    # Whole vectors at a time: several times as fast as `gather`, which goes number by number.
    return held.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, index.shape)


def pack(kept: AnyKept, length: int, rotation: Rotation) -> AnyKept:
    """Turn each key to its distance from the end in the cache instead of in the prompt."""
    if isinstance(kept, RaggedKept):
        return RaggedKept(tuple(_turned(head, length, rotation) for head in kept.heads))
    return _turned(kept, length, rotation)


def _turned(kept: KeptLayer, length: int, rotation: Rotation) -> KeptLayer:
    held = kept.positions.shape[-1]
    packed = torch.arange(length - held, length, device=kept.positions.device)
    keys = rotation.turn(kept.keys, packed - kept.positions)
    return replace(kept, source=Source(keys, kept.values, kept.sums), index=None)
