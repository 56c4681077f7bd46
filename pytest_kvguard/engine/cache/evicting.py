"""Rows that evict while decoding: a new token takes the slot of an evicted one."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_kvguard.engine.attention import AttentionCall, bias_of, mix, weights_of
from pytest_kvguard.engine.cache.base import Cursor, LayerCache, Rows, aligned, widened
from pytest_kvguard.engine.cache.quantized import QuantizedCache
from pytest_kvguard.engine.rope import Rotation
from pytest_kvguard.engine.stack import StackLayer
from pytest_kvguard.policies.base import EMPTY, DecodeEviction, DecodeState
from pytest_kvguard.policies.evict import victims, victims_at_once
from pytest_kvguard.storage.base import Storage


@dataclass(frozen=True)
class Decoding:
    """How R rows evict while decoding."""

    eviction: DecodeEviction
    ratio: Tensor  # (R,) keep ratio while decoding, float64
    prompt_length: Tensor  # (R,)
    fresh: Tensor  # (R,) first position whose attention the prefill has not summed yet
    new: tuple[int, ...]  # tokens each row is fed at the most
    rotation: Rotation | None = None  # keys stay at their index in the cache
    protected: Tensor | None = None  # (R, P) bool by position, none at the last; None: no such

    @property
    def limit(self) -> int:
        """No position of any row reaches this."""
        return int(self.prompt_length.max()) + max(self.new)

    def take(self, rows: Tensor) -> "Decoding":
        """Go on with these rows only."""
        return replace(
            self,
            ratio=self.ratio[rows],
            prompt_length=self.prompt_length[rows],
            fresh=self.fresh[rows],
            new=tuple(self.new[row] for row in rows.tolist()),
            protected=None if self.protected is None else self.protected[rows],
        )

    def to(self, device: torch.device) -> "Decoding":
        """Return the same on the device of a layer."""
        return replace(
            self,
            ratio=self.ratio.to(device),
            prompt_length=self.prompt_length.to(device),
            fresh=self.fresh.to(device),
            protected=None if self.protected is None else self.protected.to(device),
        )

    def protects(self, positions: Tensor) -> Tensor | None:
        """Mark the slots that never go, by their positions, (R, Hkv, C) bool."""
        if self.protected is None:
            return None
        at = positions.clamp(min=0, max=self.protected.shape[1] - 1)
        known = self.protected[:, None].expand(-1, positions.shape[1], -1)
        return known.gather(2, at) & (positions != EMPTY)

    def slots(self, rows: Rows, index: int) -> int:
        """Return how many slots a head needs for what every row keeps of a layer and the new."""
        ratios = self.ratio.tolist()
        fixed = [0] * len(rows) if self.protected is None else self.protected.sum(dim=1).tolist()
        needed = []
        for kept, new, ratio, stay in zip(rows.kept, self.new, ratios, fixed, strict=True):
            held = kept.most(index)
            asked = self.eviction.slots(max(kept.budgets[index], held, stay + 2), new, ratio)
            needed.append(max(held + 1, min(asked, held + new)))
        return max(needed)


class FreeSlots:
    """Keys and values of R rows in a fixed number of slots, written again and again."""

    def __init__(self, rows: Rows, layer: StackLayer, index: int, slots: int) -> None:
        slots = aligned(slots, layer.keys.device)
        self.keys, self.values = rows.copy(layer, index, slots)  # (R, Hkv, C, D)
        places = rows.places(layer, index)
        self.positions = widened(places, slots - places.shape[-1], -1, EMPTY)

    def write(self, key: Tensor, value: Tensor, at: Tensor, sums: Tensor | None) -> None:
        """Put one token a row (R, Hkv, 1, D) into a free slot of each head; at: (R, 1)."""
        free = self.positions == EMPTY
        slot = free.byte().argmax(dim=-1, keepdim=True)  # the first
        spot = slot.unsqueeze(-1)
        self.keys.scatter_(2, spot.expand(-1, -1, -1, key.shape[-1]), key)
        self.values.scatter_(2, spot.expand(-1, -1, -1, value.shape[-1]), value)
        self.positions.scatter_(2, slot, at[:, None].expand_as(slot))
        if sums is not None:
            sums.scatter_(2, slot, 0.0)

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.positions = self.positions[rows]


class EvictingCache(LayerCache):
    """One layer of R rows that evicts, whether it stores keys and values as they are or as codes.

    Of what is stored as codes, a token that goes leaves its place empty: it is read no more, but
    stays in the group it was or will be encoded with.
    """

    def __init__(
        self,
        rows: Rows,
        layer: StackLayer,
        index: int,
        cursor: Cursor,
        decoding: Decoding,
        storage: Storage | None = None,
    ) -> None:
        device = layer.keys.device
        self.decoding, self.limit = decoding.to(device), decoding.limit
        self.codes = QuantizedCache(rows, layer, index, cursor, storage) if storage else None
        if self.codes is None:
            self.slots = FreeSlots(rows, layer, index, decoding.slots(rows, index))
        self.budget = torch.tensor([kept.budgets[index] for kept in rows.kept], device=device)
        self.sums: Tensor | None = None  # (R, Hkv, C) float32
        if decoding.eviction.accumulate:
            self.sums = torch.zeros(self.positions.shape, device=device)
            for row, kept in zip(self.sums, rows.kept, strict=True):
                found = kept.sums(index)
                row[:, : found.shape[1]] = found
        self._freed = torch.zeros(len(rows), dtype=torch.long, device=device)

    @property
    def device(self) -> torch.device:
        """Where the layer lies."""
        return self.budget.device

    @property
    def positions(self) -> Tensor:
        """The position each slot holds, (R, Hkv, C), EMPTY where free."""
        return self.codes.positions if self.codes else self.slots.positions

    @property
    def freed(self) -> Tensor:
        """Slots that were emptied while decoding, over all heads, (R,)."""
        return self._freed

    @property
    def bytes(self) -> Tensor | None:
        """Bytes of what each row stores, (R,)."""
        return self.codes.bytes if self.codes else None

    def attend(self, call: AttentionCall, asking: Tensor, real: Tensor | None) -> Tensor:
        """Take the new tokens one by one: write, attend, evict."""
        writing, key, value = asking, call.key, call.value
        if real is not None:  # padding may see nothing, so that it is no number
            writing = torch.where(real, asking, EMPTY)
            key, value = (x.masked_fill(~real[:, None, :, None], 0.0) for x in (key, value))
        seen = []
        for token in range(asking.shape[1]):
            new = slice(token, token + 1)
            at = writing[:, new]
            keys, values = self._write(key[:, :, new], value[:, :, new], at)
            bias = bias_of(self.positions != EMPTY, torch.float32).unsqueeze(2)
            weights = weights_of(call.query[:, :, new], keys, bias, call.scoring)
            if real is not None:
                weights = weights.masked_fill(~real[:, None, new, None], 0.0)
            seen.append(mix(weights, values))
            if self.codes is not None:
                self.codes.settle(1)
            self._evict(weights[:, :, 0], at[:, 0], padded=real is not None)
        return seen[0] if len(seen) == 1 else torch.cat(seen, dim=2)

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        (self.codes or self.slots).take(rows)
        self.budget, self._freed = self.budget[rows], self._freed[rows]
        self.sums = None if self.sums is None else self.sums[rows]
        self.decoding = self.decoding.take(rows)

    def grow(self, more: int) -> None:
        """Make room for more codes; slots that are written again have room for all that come."""
        if self.codes is not None:
            self.codes.grow(more)
            if self.sums is not None:
                self.sums = widened(self.sums, more, -1)

    def _write(self, key: Tensor, value: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Hold one token a row; return all keys and values, (R, Hkv, C, D)."""
        if self.codes is not None:
            return self.codes.write(key, value, at)
        self.slots.write(key, value, at, self.sums)
        return self.slots.keys, self.slots.values

    def _evict(self, weights: Tensor, newest: Tensor, *, padded: bool) -> None:
        """Free slots of each head. weights: (R, Hq, C) float32, newest: (R,)."""
        decoding, positions = self.decoding, self.positions
        if self.sums is not None:
            by_head = weights.unflatten(1, (positions.shape[1], -1)).sum(dim=2)
            # What a token fed again pays to the others was summed at prefill; to itself, not.
            own = positions == newest[:, None, None]
            counted = own | (newest >= decoding.fresh)[:, None, None]
            self.sums += by_head.masked_fill(~counted, 0.0)
        state = DecodeState(
            weights=weights,
            sums=self.sums,
            positions=positions,
            newest=newest,
            prompt_length=decoding.prompt_length,
            budget=self.budget,
            ratio=decoding.ratio,
            protected=decoding.protects(positions),
            limit=self.limit,
        )
        if decoding.eviction.burst > 1:
            gone = victims_at_once(decoding.eviction, state)
        else:
            slot = victims(decoding.eviction, state).unsqueeze(-1)  # (R, Hkv, 1)
            gone = torch.zeros_like(positions, dtype=torch.bool)
            gone.scatter_(2, slot.clamp(min=0), slot != EMPTY)
        if padded:
            gone = gone & (newest != EMPTY)[:, None, None]
        self._freed += gone.sum(dim=(1, 2))
        if decoding.rotation is not None:  # what came before the gap moves up by one
            self._rotate(decoding.rotation, gone)
        positions.masked_fill_(gone, EMPTY)

    def _rotate(self, rotation: Rotation, gone: Tensor) -> None:
        """Rotate each key by the number of positions that go after it. gone: (R, Hkv, C)."""
        if self.codes is not None:
            raise AssertionError("a Policy refuses to store as codes what moves while decoding")
        at = self.positions.masked_fill(~gone, EMPTY).amax(dim=-1, keepdim=True)
        before = (self.positions < at) & (self.positions != EMPTY)
        self.slots.keys.copy_(rotation.turn(self.slots.keys, before.int()))
