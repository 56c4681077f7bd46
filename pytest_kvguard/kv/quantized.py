"""Rows whose cache is stored as codes: what attention reads is what the codes restore to.

Tokens of a head lie in order of arrival, so how many have come says which of them are codes
(`Storage`). Several new tokens are attended in one pass, each of them as if they had come one
by one: it reads as codes what would have been encoded when its turn came, and nothing else.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.kv.attention import attend, visible
from pytest_kvguard.kv.compress import AnyKept, KeptLayer
from pytest_kvguard.kv.evicting import Decoding, EvictingBase
from pytest_kvguard.kv.piles import stack
from pytest_kvguard.kv.rows import LayerFactory, OneWay, RaggedLayer, RowLayer, growing
from pytest_kvguard.kv.seam import Step
from pytest_kvguard.policies.base import EMPTY, Codec, Storage


class Shelf:
    """The keys, or the values, of R rows: the oldest as codes, the rest as they are."""

    def __init__(self, codec: Codec, tokens: Tensor, count: Tensor, coded: Tensor) -> None:
        """Store the first ``count`` (R, Hkv) of tokens (R, Hkv, C, D), ``coded`` of them as codes.

        What is coded must be whole spans of the codec.
        """
        self.codec = codec
        self.parts = codec.encode(tokens[:, :, :0])  # each (R, Hkv, units, *)
        self.rest = tokens[:, :, :0]  # (R, Hkv, n, D)
        self.count = self.coded = torch.zeros_like(count)
        self.store(tokens, count, coded)

    def read(self) -> Tensor:
        """Return what is held as attention sees it, (R, Hkv, C, D); codes are restored."""
        most = int(self.count.max())
        rank = torch.arange(most, device=self.count.device)
        if not self.rest.shape[2]:
            return self.codec.decode(self.parts)[:, :, :most]
        whole = _take(self.rest, rank - self.coded.unsqueeze(-1))
        if not self.parts[0].shape[2]:
            return whole
        restored = _take(self.codec.decode(self.parts), rank.expand(*self.count.shape, -1))
        old = rank < self.coded.unsqueeze(-1)
        return torch.where(old.unsqueeze(-1), restored, whole)

    def store(self, tokens: Tensor, count: Tensor, coded: Tensor) -> None:
        """Go on to ``count`` tokens, ``coded`` of them as codes.

        Of ``tokens`` (R, Hkv, C, D) only those that are no codes yet are looked at.
        """
        more = int((coded - self.coded).max())
        if more:
            place = torch.arange(more, device=coded.device)
            fresh = self.codec.encode(_take(tokens, self.coded.unsqueeze(-1) + place))
            span = self.codec.span
            unit = torch.arange(more // span, device=coded.device)
            new = unit < ((coded - self.coded) // span).unsqueeze(-1)  # (R, Hkv, units)
            at = (self.coded // span).unsqueeze(-1) + unit
            self.parts = tuple(
                write(part, at, new, part_of_new)
                for part, part_of_new in zip(self.parts, fresh, strict=True)
            )
        left = torch.arange(int((count - coded).max()), device=coded.device)
        self.rest = _take(tokens, coded.unsqueeze(-1) + left)
        self.count, self.coded = count, coded

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.parts = tuple(part[rows] for part in self.parts)
        self.rest, self.count, self.coded = self.rest[rows], self.count[rows], self.coded[rows]

    @property
    def bytes(self) -> Tensor:
        """Bytes of what each row stores, (R,); each head takes what the fullest of its row does.

        What pads a row to the longest of the rows is not its own.
        """
        unit = sum(part.shape[3:].numel() * part.element_size() for part in self.parts)
        token = self.rest.shape[-1] * self.rest.element_size()
        units, rest = (self.coded // self.codec.span).amax(1), (self.count - self.coded).amax(1)
        return (units * unit + rest * token) * self.count.shape[1]


class QuantizedLayer(OneWay):
    """One layer of R rows in which everything new stays, stored as a `Storage` says."""

    def __init__(self, kept: Sequence[KeptLayer], storage: Storage) -> None:
        most = max(layer.positions.shape[1] for layer in kept)
        keys = stack([layer.keys for layer in kept], most)
        values = stack([layer.values for layer in kept], most)
        self.storage = storage
        self.positions = stack([layer.positions for layer in kept], most, EMPTY)  # (R, Hkv, C)
        self.count = (self.positions != EMPTY).sum(dim=-1)  # (R, Hkv) arrivals
        self.keys = Shelf(storage.keys, keys, self.count, storage.coded_keys(self.count))
        self.values = Shelf(storage.values, values, self.count, storage.coded_values(self.count))
        self.freed = torch.zeros(len(kept), dtype=torch.long, device=keys.device)

    def attend(self, step: Step, asking: Tensor, writing: Tensor) -> Tensor:
        """Store the new tokens and attend in one go, each token as if it had come alone."""
        before = self.count
        first = self.write(step.key, step.value, writing)
        mask = visible(self.positions, asking[:, None])
        if asking.shape[1] == 1 or not self.storage.residual:
            keys, values = first if self.storage.residual else self.read()
            return attend(step.query, keys, values, mask, step.scaling)
        come = (writing != EMPTY).cumsum(dim=-1)  # (R, Q), the token itself among them
        seen = before.unsqueeze(-1) + (come - 1).clamp(min=0)[:, None]  # (R, Hkv, Q)
        rank = torch.arange(mask.shape[-1], device=mask.device)
        return attend_both(
            step.query,
            first,
            self.read(),
            rank < self.storage.coded_keys(seen).unsqueeze(-1),
            rank < self.storage.coded_values(seen).unsqueeze(-1),
            mask,
            step.scaling,
        )

    def write(self, key: Tensor, value: Tensor, writing: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens (R, Hkv, Q, D); padding, where ``writing`` is EMPTY, is dropped.

        Returns keys and values (R, Hkv, C, D) with the new tokens, before any more are encoded.
        """
        real = (writing != EMPTY)[:, None].expand(-1, self.count.shape[1], -1)  # (R, Hkv, Q)
        at = self.count.unsqueeze(-1) + real.cumsum(dim=-1) - 1
        keys = write(self.keys.read(), at, real, key)
        values = write(self.values.read(), at, real, value)
        self.positions = write(self.positions, at, real, writing[:, None].expand_as(at), EMPTY)
        self.count = self.count + real.sum(dim=-1)
        self.keys.store(keys, self.count, self.storage.coded_keys(self.count))
        self.values.store(values, self.count, self.storage.coded_values(self.count))
        return keys, values

    def read(self) -> tuple[Tensor, Tensor]:
        """Return keys and values (R, Hkv, C, D) as they are stored; codes are restored."""
        return self.keys.read(), self.values.read()

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.keys.take(rows)
        self.values.take(rows)
        self.count, self.freed = self.count[rows], self.freed[rows]
        self.positions = self.positions[rows, :, : int(self.count.max())]

    @property
    def bytes(self) -> Tensor:
        """Bytes of what each row stores, (R,)."""
        return self.keys.bytes + self.values.bytes


class QuantizedEvictingLayer(EvictingBase):
    """One layer of R rows that evict while decoding, stored as a `Storage` says.

    What is evicted leaves its place empty: it is read no more, but stays in the group it was or
    will be encoded with. Heads that hold different numbers are padded to the fullest.
    """

    def __init__(self, kept: Sequence[AnyKept], decoding: Decoding, storage: Storage) -> None:
        self.stored = QuantizedLayer([layer.padded for layer in kept], storage)
        super().__init__(kept, decoding, self.stored.positions.shape[-1])
        self.positions = self.stored.positions

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        super().take(rows)
        self.stored.take(rows)
        self.positions = self.stored.positions
        self._trim()

    @property
    def bytes(self) -> Tensor:
        """Bytes of what each row stores, (R,)."""
        return self.stored.bytes

    def _trim(self) -> None:
        """Leave as many sums as there are places."""
        if self.sums is not None:
            self.sums = self.sums[:, :, : self.positions.shape[-1]]

    def _turn(self, by: Tensor) -> None:
        """Codes cannot be turned."""
        raise AssertionError("a Policy refuses to store as codes what moves while decoding")

    def _write(self, key: Tensor, value: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token a row, and show keys and values as it reads them."""
        first = self.stored.write(key, value, position[:, None])
        self.positions = self.stored.positions  # the same tensor: what is evicted is empty in both
        if self.sums is not None:
            self.sums = F.pad(self.sums, (0, self.positions.shape[-1] - self.sums.shape[-1]))
        return first if self.stored.storage.residual else self.stored.read()


def quantized(storage: Storage, decoding: Decoding | None = None) -> LayerFactory:
    """Make the layers of rows that are stored as codes; sliding layers are left alone."""

    def make(kept: Sequence[AnyKept]) -> RowLayer:
        if kept[0].window is not None:
            return growing(kept)
        if decoding is not None:
            return QuantizedEvictingLayer(kept, decoding, storage)
        even = [layer for layer in kept if isinstance(layer, KeptLayer)]
        return QuantizedLayer(even, storage) if len(even) == len(kept) else RaggedLayer(kept, make)

    return make


def attend_both(
    query: Tensor,
    first: tuple[Tensor, Tensor],
    later: tuple[Tensor, Tensor],
    later_keys: Tensor,
    later_values: Tensor,
    mask: Tensor,
    scaling: float,
) -> Tensor:
    """Attend to keys and values that change between queries.

    query: (R, Hq, Q, D); first, later: keys and values, (R, Hkv, C, D) each, as they are at first
    and later on; later_keys, later_values: (R, Hkv, Q, C) which of them a query finds as they are
    later on; mask: (R, Hkv, Q, C) -> (R, Hq, Q, D)
    """
    (keys, values), (keys_later, values_later) = (_shared(pair) for pair in (first, later))
    heads = keys.shape[1]
    by_head = query.float().unflatten(1, (heads, query.shape[1] // heads))  # (R, Hkv, G, Q, D)
    logits = torch.where(
        later_keys.unsqueeze(2),
        by_head @ keys_later.transpose(-1, -2),
        by_head @ keys.transpose(-1, -2),
    )
    weights = (logits * scaling).masked_fill(~mask.unsqueeze(2), float("-inf")).softmax(dim=-1)
    late = weights * later_values.unsqueeze(2)
    seen = (weights - late) @ values + late @ values_later
    return seen.flatten(1, 2).to(query.dtype)


def write(held: Tensor, at: Tensor, real: Tensor, new: Tensor, empty: int = 0) -> Tensor:
    """Return a copy with new items in their places; it grows as needed, filled with ``empty``.

    held: (R, Hkv, C, *); at: (R, Hkv, n) places; real: (R, Hkv, n) whether there is an item;
    new: (R, Hkv, n, *)
    """
    row, head, item = real.nonzero(as_tuple=True)
    place = at[row, head, item]
    size = max(held.shape[2], int(place.max()) + 1) if len(place) else held.shape[2]
    out = held.new_full((*held.shape[:2], size, *held.shape[3:]), empty)
    out[:, :, : held.shape[2]] = held
    out[row, head, place] = new[row, head, item]
    return out


def _take(held: Tensor, index: Tensor) -> Tensor:
    """Pick items by place, the nearest where there is none: (R, Hkv, C, D), (R, Hkv, n)."""
    index = index.clamp(min=0, max=max(0, held.shape[2] - 1))
    return held.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, held.shape[-1]))


def _shared(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Show keys and values to the query heads that share them: (R, Hkv, 1, C, D) float32."""
    return tuple(tensor.float().unsqueeze(2) for tensor in pair)
