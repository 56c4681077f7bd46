"""Rows that evict while decoding: a new token takes the slot of an evicted one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kvguard.kv.attention import visible, weights
from pytest_kvguard.kv.compress import KeptLayer
from pytest_kvguard.kv.rope import Rotation
from pytest_kvguard.kv.rows import GrowingLayer, LayerFactory, RowLayer, held_bytes, stack
from pytest_kvguard.kv.seam import Step
from pytest_kvguard.policies.base import EMPTY, DecodeEviction, DecodeState
from pytest_kvguard.policies.evict import victims


@dataclass(frozen=True)
class Decoding:
    """How R rows evict while decoding."""

    eviction: DecodeEviction
    ratio: Tensor  # (R,) keep ratio while decoding
    prompt_length: Tensor  # (R,)
    fresh: Tensor  # (R,) first position whose attention the prefill has not summed yet
    slots: int  # the most any row needs
    rotation: Rotation | None = None  # keys stay at their index in the cache

    def take(self, rows: Tensor) -> "Decoding":
        """Go on with these rows only."""
        return Decoding(
            self.eviction,
            self.ratio[rows],
            self.prompt_length[rows],
            self.fresh[rows],
            self.slots,
            self.rotation,
        )


class EvictingLayer:
    """One layer of R rows with a fixed number of slots."""

    def __init__(self, kept: Sequence[KeptLayer], decoding: Decoding) -> None:
        most = max(int(layer.held.max()) for layer in kept)
        slots = max(decoding.slots, most + 1)
        self.decoding = decoding
        self.keys = stack([layer.keys for layer in kept], slots)
        self.values = stack([layer.values for layer in kept], slots)
        self.positions = stack([layer.positions for layer in kept], slots, EMPTY)
        self.budget = torch.tensor([layer.budget for layer in kept], device=self.keys.device)
        self.sums: Tensor | None = None
        if decoding.eviction.accumulate:
            self.sums = stack([_sums(layer) for layer in kept], slots)
        self.freed = torch.zeros(len(kept), dtype=torch.long, device=self.keys.device)  # (R,)

    def attend(self, step: Step, asking: Tensor, writing: Tensor) -> Tensor:
        """Take the new tokens one by one: write, attend, evict."""
        seen = []
        for at in range(asking.shape[1]):
            new = slice(at, at + 1)
            self._write(step.key[:, :, new], step.value[:, :, new], writing[:, at])
            mask = visible(self.positions, asking[:, None, new])
            attention = weights(step.query[:, :, new], self.keys, mask, step.scaling)
            seen.append(self._mix(attention))
            self._evict(attention[:, :, 0], writing[:, at])
        return torch.cat(seen, dim=2)

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.positions, self.budget = self.positions[rows], self.budget[rows]
        self.sums = None if self.sums is None else self.sums[rows]
        self.freed, self.decoding = self.freed[rows], self.decoding.take(rows)

    @property
    def bytes(self) -> Tensor:
        """Bytes of what each row holds, (R,)."""
        return held_bytes(self.positions, self.keys, self.values)

    def _write(self, key: Tensor, value: Tensor, position: Tensor) -> None:
        """Put one token a row into a free slot of each head; padding is dropped."""
        slot = (self.positions == EMPTY).int().argmax(dim=-1, keepdim=True)  # (R, Hkv, 1)
        real = (position != EMPTY)[:, None, None]
        for held, new in ((self.keys, key), (self.values, value)):
            index = slot.unsqueeze(-1).expand(-1, -1, -1, held.shape[-1])
            held.scatter_(2, index, torch.where(real.unsqueeze(-1), new, held.gather(2, index)))
        now = torch.where(real, position[:, None, None], self.positions.gather(2, slot))
        self.positions.scatter_(2, slot, now)
        if self.sums is not None:
            self.sums.scatter_(2, slot, torch.where(real, 0.0, self.sums.gather(2, slot)))

    def _mix(self, attention: Tensor) -> Tensor:
        """Weigh the values: (R, Hq, 1, C) -> (R, Hq, 1, D)."""
        rows, heads = self.values.shape[:2]
        by_head = attention.to(self.values.dtype).reshape(rows, heads, -1, self.values.shape[2])
        return (by_head @ self.values).reshape(rows, attention.shape[1], 1, -1)

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
            by_head = attention.unflatten(1, (self.keys.shape[1], -1)).sum(dim=2)
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
        )
        slot = victims(decoding.eviction, state)  # (R, Hkv)
        gone = (slot != EMPTY) & (newest != EMPTY)[:, None]
        self.freed += gone.sum(dim=1)
        index = slot.clamp(min=0).unsqueeze(-1)
        position = self.positions.gather(2, index)
        if decoding.rotation is not None:  # what came before the gap moves up by one
            before = (self.positions < position) & (self.positions != EMPTY) & gone.unsqueeze(-1)
            self.keys = decoding.rotation.turn(self.keys, before.int())
        self.positions.scatter_(2, index, torch.where(gone.unsqueeze(-1), EMPTY, position))
        return gone


def evicting(decoding: Decoding) -> LayerFactory:
    """Make the layers of rows that evict; sliding layers are left alone."""

    def make(kept: Sequence[KeptLayer]) -> RowLayer:
        if kept[0].window is not None:
            return GrowingLayer(kept)
        return EvictingLayer(kept, decoding)

    return make


def _sums(layer: KeptLayer) -> Tensor:
    if layer.sums is None:
        raise AssertionError("a policy that accumulates must also ask for sums at prefill")
    return layer.sums
