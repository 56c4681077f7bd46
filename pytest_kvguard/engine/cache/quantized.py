"""Rows whose cache is stored as codes: what attention reads is what the codes restore to.

Tokens of a head lie in order of arrival, so how many have come says which of them are codes
(`Storage`). Where several rows of a grid are quantized, what is held here is what the codes
restore to; the bytes that are reported are those of the codes.
"""

import torch
from torch import Tensor

from pytest_kvguard.engine.attention import (
    AttentionCall,
    Scoring,
    attend,
    bias_of,
    grouped,
    products,
    visible,
)
from pytest_kvguard.engine.cache.base import Cursor, LayerCache, Rows, aligned, widened
from pytest_kvguard.engine.stack import StackLayer
from pytest_kvguard.policies.base import EMPTY
from pytest_kvguard.policies.logits import capped, softmax
from pytest_kvguard.storage.base import Codec, Storage


class QuantizedCache(LayerCache):
    """One layer of R rows in which everything new stays, stored as a `Storage` says."""

    def __init__(
        self, rows: Rows, layer: StackLayer, index: int, cursor: Cursor, storage: Storage
    ) -> None:
        layers = rows.kept[0].prefill.stack.layers
        storage = storage.of_layer(list(layers).index(layer.layer), len(layers))
        self.storage = storage
        most, device = rows.most(layer, index), layer.keys.device
        # A group of tokens is looked at as a whole, also behind the newest.
        slack = max(storage.residual, storage.keys.span, storage.values.span)
        slots = aligned(most + cursor.capacity + slack, device)
        self.keys, self.values = rows.copy(layer, index, slots)  # (R, Hkv, C, D)
        self.positions = widened(rows.places(layer, index), slots - most, -1, EMPTY)
        self.count = (self.positions != EMPTY).sum(dim=-1)  # (R, Hkv) arrivals
        self.before = torch.zeros_like(self.count)  # arrivals before the newest
        if storage.residual:
            self._encode(self.before, self.count, most)
        else:
            self.keys, self.values = restored(storage, self.keys, self.values)

    def attend(self, call: AttentionCall, asking: Tensor, real: Tensor | None) -> Tensor:
        """Store the new tokens and attend in one go, each token as if it had come alone."""
        width, before = asking.shape[1], self.count.clone()
        at = asking if real is None else torch.where(real, asking, EMPTY)
        first = self.write(call.key, call.value, at)
        mask = visible(self.positions, asking[:, None])
        if width == 1 or not self.storage.residual:
            keys, values = first
            out = attend(call.query, keys, values, bias_of(mask, call.query.dtype), call.scoring)
            self.settle(width)
            return out
        first = first[0].clone(), first[1].clone()
        self.settle(width)
        come = (at != EMPTY).cumsum(dim=-1)  # (R, Q), the token itself among them
        seen = before.unsqueeze(-1) + (come - 1).clamp(min=0)[:, None]  # (R, Hkv, Q)
        rank = torch.arange(mask.shape[-1], device=mask.device)
        return attend_both(
            call.query,
            first,
            (self.keys, self.values),
            rank < self.storage.coded_keys(seen).unsqueeze(-1),
            rank < self.storage.coded_values(seen).unsqueeze(-1),
            mask,
            call.scoring,
        )

    def write(self, key: Tensor, value: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Write new tokens (R, Hkv, Q, D) at positions (R, Q), EMPTY for padding.

        Returns keys and values (R, Hkv, C, D) as the new tokens see them: with a residual before
        any more are encoded, without one as codes. Call `settle` when they have attended.
        """
        if not self.storage.residual:
            key, value = restored(self.storage, key, value)
        real = (at != EMPTY)[:, None].expand(-1, self.count.shape[1], -1)  # (R, Hkv, Q)
        place = self.count.unsqueeze(-1) + real.cumsum(dim=-1) - 1
        place = place.masked_fill(~real, self.keys.shape[2] - 1)  # behind all that ever come
        for held, new in ((self.keys, key), (self.values, value)):
            held.scatter_(2, place.unsqueeze(-1).expand(-1, -1, -1, new.shape[-1]), new)
        self.positions.scatter_(2, place, at[:, None].expand_as(place))
        self.before.copy_(self.count)
        self.count += real.sum(dim=-1)
        return self.keys, self.values

    def settle(self, width: int) -> None:
        """Encode what is due after ``width`` tokens were attended."""
        if self.storage.residual:
            self._encode(self.before, self.count, width)

    def _encode(self, before: Tensor, after: Tensor, width: int) -> None:
        """Go from ``before`` to ``after`` arrivals (R, Hkv), at most ``width`` more, in codes."""
        storage, group = self.storage, self.storage.residual
        groups = (group - 1 + width) // group * group  # keys are encoded a residual at a time
        coded = storage.coded_keys
        restore(self.keys, storage.keys, coded(before), coded(after), groups)
        coded = storage.coded_values
        restore(self.values, storage.values, coded(before), coded(after), width)

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.positions = self.positions[rows]
        self.count, self.before = self.count[rows], self.before[rows]

    def grow(self, more: int) -> None:
        """Make room for ``more`` new tokens."""
        self.keys, self.values = widened(self.keys, more, -2), widened(self.values, more, -2)
        self.positions = widened(self.positions, more, -1, EMPTY)

    @property
    def bytes(self) -> Tensor:
        """Bytes of what each row stores, codes and what is not yet encoded, (R,)."""
        storage, count = self.storage, self.count
        keys = stored_bytes(storage.keys, self.keys, storage.coded_keys(count), count)
        values = stored_bytes(storage.values, self.values, storage.coded_values(count), count)
        return (keys + values).sum(dim=1)


def restored(storage: Storage, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Put keys and values (R, Hkv, n, D), each token by itself, through their codecs."""
    if storage.keys == storage.values and keys.shape == values.shape:  # one go for both
        both = torch.cat([keys, values], dim=1)
        first, second = round_trip(storage.keys, both).chunk(2, dim=1)
        return first, second
    return round_trip(storage.keys, keys), round_trip(storage.values, values)


def round_trip(codec: Codec, tokens: Tensor) -> Tensor:
    """Return what tokens (..., n, D) are restored to from their codes."""
    return codec.decode(codec.encode(tokens), tokens.dtype)


def restore(held: Tensor, codec: Codec, start: Tensor, end: Tensor, most: int) -> None:
    """Put tokens ``start`` to ``end`` (R, Hkv), at most ``most``, through a codec, in place.

    held: (R, Hkv, C, D). Both ends are multiples of the codec's span.
    """
    most = -(-most // codec.span) * codec.span
    if not most:
        return
    place = start.unsqueeze(-1) + torch.arange(most, device=held.device)
    new = place < end.unsqueeze(-1)
    spot = place.clamp(max=held.shape[2] - 1).unsqueeze(-1).expand(-1, -1, -1, held.shape[-1])
    tokens = held.gather(2, spot)
    held.scatter_(2, spot, torch.where(new.unsqueeze(-1), round_trip(codec, tokens), tokens))


def stored_bytes(codec: Codec, held: Tensor, coded: Tensor, count: Tensor) -> Tensor:
    """Bytes of ``count`` tokens of each head, ``coded`` of them as codes, (R, Hkv)."""
    parts = codec.encode(held[:1, :1, : codec.span])
    unit = sum(part.nbytes for part in parts)
    token = held.shape[-1] * held.element_size()
    return coded // codec.span * unit + (count - coded) * token


def attend_both(
    query: Tensor,
    first: tuple[Tensor, Tensor],
    later: tuple[Tensor, Tensor],
    later_keys: Tensor,
    later_values: Tensor,
    mask: Tensor,
    scoring: Scoring,
) -> Tensor:
    """Attend to keys and values that change between queries.

    query: (R, Hq, Q, D); first, later: keys and values, (R, Hkv, C, D) each, as they are at first
    and later on; later_keys, later_values: (R, Hkv, Q, C) which of them a query finds as they are
    later on; mask: (R, Hkv, Q, C) -> (R, Hq, Q, D)
    """
    heads, width = first[0].shape[1], query.shape[2]
    by_head = grouped(query, heads)
    logits = torch.where(
        later_keys.unsqueeze(2),
        products(by_head, later[0], scoring.scaling).unflatten(2, (-1, width)),
        products(by_head, first[0], scoring.scaling).unflatten(2, (-1, width)),
    )
    logits = capped(logits, scoring.softcap).masked_fill(~mask.unsqueeze(2), float("-inf"))
    weights = softmax(logits, scoring.sinks)  # (R, Hkv, G, Q, C)
    late = weights * later_values.unsqueeze(2)
    dtype = query.dtype
    seen = (weights - late).to(dtype).flatten(2, 3) @ first[1]
    seen = seen + late.to(dtype).flatten(2, 3) @ later[1]
    return seen.reshape(query.shape[:-1] + seen.shape[-1:])
