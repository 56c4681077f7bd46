"""Rows that evict while decoding: a new token takes the slot of an evicted one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kvguard.kv.attention import visible, weights
from pytest_kvguard.kv.compress import AnyKept, KeptLayer
from pytest_kvguard.kv.piles import stack
from pytest_kvguard.kv.rope import Rotation
from pytest_kvguard.kv.rows import (
    LayerFactory,
    OneWay,
    RowLayer,
    by_head,
    growing,
    held_bytes,
)
from pytest_kvguard.kv.seam import Step
from pytest_kvguard.kv.slots import Slots
from pytest_kvguard.policies.base import EMPTY, DecodeEviction, DecodeState
from pytest_kvguard.policies.evict import victims


@dataclass(frozen=True)
class Decoding:
    """How R rows evict while decoding."""

    eviction: DecodeEviction
    ratio: Tensor  # (R,) keep ratio while decoding
    prompt_length: Tensor  # (R,)
    fresh: Tensor  # (R,) first position whose attention the prefill has not summed yet
    new: tuple[int, ...]  # tokens each row is fed at the most
    rotation: Rotation | None = None  # keys stay at their index in the cache
    protected: Tensor | None = None  # (R, P) bool by position, none at the last; None: no such

    def take(self, rows: Tensor) -> "Decoding":
        """Go on with these rows only."""
        return Decoding(
            self.eviction,
            self.ratio[rows],
            self.prompt_length[rows],
            self.fresh[rows],
            self.new,
            self.rotation,
            None if self.protected is None else self.protected[rows],
        )

    def protects(self, positions: Tensor) -> Tensor | None:
        """Mark the slots that never go, by their positions, (R, Hkv, C) bool."""
        if self.protected is None:
            return None
        at = positions.clamp(min=0, max=self.protected.shape[1] - 1)
        known = self.protected[:, None].expand(-1, positions.shape[1], -1)
        return known.gather(2, at) & (positions != EMPTY)

    def slots(self, kept: Sequence[KeptLayer]) -> int:
        """Return how many slots one head needs for what every row keeps of it and for the new."""
        ratios = self.ratio.tolist()
        fixed = [0] * len(kept) if self.protected is None else self.protected.sum(dim=1).tolist()
        return max(self._slots(*row) for row in zip(kept, self.new, ratios, fixed, strict=True))

    def _slots(self, layer: KeptLayer, new: int, ratio: float, fixed: int) -> int:
        held = layer.positions.shape[1]
        asked = self.eviction.slots(max(layer.budget, held, fixed + 2), new, ratio)
        return max(held + 1, min(asked, held + new))


class EvictingBase(OneWay, ABC):
    """One layer of R rows that evicts, however it holds its keys and values."""

    def __init__(self, kept: Sequence[AnyKept], decoding: Decoding, slots: int) -> None:
        heads = by_head(kept)
        self.decoding = decoding
        self.positions = torch.cat(  # (R, Hkv, C)
            [stack([row.positions for row in rows], slots, EMPTY) for rows in heads], dim=1
        )
        device = self.positions.device
        self.budget = torch.tensor([layer.budget for layer in kept], device=device)
        self.sums: Tensor | None = None
        if decoding.eviction.accumulate:
            sums = [stack([_sums(row) for row in rows], slots) for rows in heads]
            self.sums = torch.cat(sums, dim=1)
        self._freed = torch.zeros(len(kept), dtype=torch.long, device=device)  # (R,)

    @property
    def freed(self) -> Tensor:
        """Slots that were emptied while decoding, over all heads, (R,)."""
        return self._freed

    def attend(self, step: Step, asking: Tensor, writing: Tensor) -> Tensor:
        """Take the new tokens one by one: write, attend, evict."""
        seen = []
        for at in range(asking.shape[1]):
            new = slice(at, at + 1)
            keys, values = self._write(step.key[:, :, new], step.value[:, :, new], writing[:, at])
            mask = visible(self.positions, asking[:, None, new])
            attention = weights(step.query[:, :, new], keys, mask, step.scaling)
            seen.append(_mix(attention, values))
            self._evict(attention[:, :, 0], writing[:, at])
        return torch.cat(seen, dim=2)

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.positions, self.budget = self.positions[rows], self.budget[rows]
        self.sums = None if self.sums is None else self.sums[rows]
        self._freed, self.decoding = self._freed[rows], self.decoding.take(rows)

    @abstractmethod
    def _write(self, key: Tensor, value: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Hold one token a row, padding dropped; return all keys and values, (R, Hkv, C, D)."""

    @abstractmethod
    def _turn(self, by: Tensor) -> None:
        """Turn each key by a number of positions, (R, Hkv, C)."""

    def _evict(self, attention: Tensor, newest: Tensor) -> None:
        """Free slots of each head, one after the other. attention: (R, Hq, C), newest: (R,)."""
        self._sum(attention, newest)
        burst = self.decoding.eviction.burst
        for _ in range(burst):
            freed = self._free(attention, newest)
            if burst > 1 and not freed.any():  # to ask waits for the device
                break

    def _sum(self, attention: Tensor, newest: Tensor) -> None:
        """Add what each slot got to its sum."""
        if self.sums is not None:
            by_head = attention.unflatten(1, (self.positions.shape[1], -1)).sum(dim=2)
            # What a token fed again pays to the others was summed at prefill; to itself, not.
            own = self.positions == newest[:, None, None]
            counted = own | (newest >= self.decoding.fresh)[:, None, None]
            self.sums += torch.where(counted, by_head, 0.0)

    def _free(self, attention: Tensor, newest: Tensor) -> Tensor:
        """Free at most one slot a head; return which heads did, (R, Hkv) bool."""
        decoding = self.decoding
        state = DecodeState(
            weights=attention,
            sums=self.sums,
            positions=self.positions,
            newest=newest,
            prompt_length=decoding.prompt_length,
            budget=self.budget,
            ratio=decoding.ratio,
            protected=decoding.protects(self.positions),
        )
        slot = victims(decoding.eviction, state)  # (R, Hkv)
        gone = (slot != EMPTY) & (newest != EMPTY)[:, None]
        self._freed += gone.sum(dim=1)
        index = slot.clamp(min=0).unsqueeze(-1)
        position = self.positions.gather(2, index)
        if decoding.rotation is not None:  # what came before the gap moves up by one
            before = (self.positions < position) & (self.positions != EMPTY) & gone.unsqueeze(-1)
            self._turn(before.int())
        self.positions.scatter_(2, index, torch.where(gone.unsqueeze(-1), EMPTY, position))
        return gone


class EvictingLayer(EvictingBase):
    """One layer of R rows with a fixed number of slots for each head."""

    def __init__(self, kept: Sequence[AnyKept], decoding: Decoding) -> None:
        heads = by_head(kept)
        sizes = [decoding.slots(rows) for rows in heads]
        super().__init__(kept, decoding, max(sizes))
        self.keys = Slots([[row.keys for row in rows] for rows in heads], sizes)
        self.values = Slots([[row.values for row in rows] for rows in heads], sizes)

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        super().take(rows)
        self.keys.take(rows)
        self.values.take(rows)

    @property
    def bytes(self) -> Tensor:
        """Bytes of what each row holds, (R,)."""
        return held_bytes(self.positions, self.keys.flat, self.values.flat)

    def _write(self, key: Tensor, value: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Put one token a row into a free slot of each head."""
        slot = (self.positions == EMPTY).int().argmax(dim=-1, keepdim=True)  # (R, Hkv, 1)
        real = (position != EMPTY)[:, None, None]
        self.keys.write(slot, key, real)
        self.values.write(slot, value, real)
        now = torch.where(real, position[:, None, None], self.positions.gather(2, slot))
        self.positions.scatter_(2, slot, now)
        if self.sums is not None:
            self.sums.scatter_(2, slot, torch.where(real, 0.0, self.sums.gather(2, slot)))
        return self.keys.read(), self.values.read()

    def _turn(self, by: Tensor) -> None:
        """Turn each key by a number of positions, (R, Hkv, C)."""
        if self.decoding.rotation is not None:
            self.keys.turn(self.decoding.rotation, by)


def evicting(decoding: Decoding) -> LayerFactory:
    """Make the layers of rows that evict; sliding layers are left alone."""

    def make(kept: Sequence[AnyKept]) -> RowLayer:
        if kept[0].window is not None:
            return growing(kept)
        return EvictingLayer(kept, decoding)

    return make


def _mix(attention: Tensor, values: Tensor) -> Tensor:
    """Weigh the values (R, Hkv, C, D): (R, Hq, 1, C) -> (R, Hq, 1, D)."""
    rows, heads, slots, size = values.shape
    by_group = attention.to(values.dtype).reshape(rows, heads, -1, slots)
    return (by_group @ values).reshape(rows, attention.shape[1], 1, size)


def _sums(layer: KeptLayer) -> Tensor:
    if layer.sums is None:
        raise AssertionError("a policy that accumulates must also ask for sums at prefill")
    return layer.sums
