"""Rows decoded together: ragged caches side by side, each token seeing only its own row.

A row is one prompt under one policy at one ratio. Rows differ in what they hold, per layer and
per head; a slot knows the position of what it holds, and who may see whom follows from positions
alone. New tokens come right-aligned: padding is in front and leaves nothing behind.

Heads that hold equally many share their tensors; others have their own, each no longer than the
longest row of that very head.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.kv.attention import attend, visible
from pytest_kvguard.kv.compress import AnyKept, Kept, KeptLayer
from pytest_kvguard.kv.piles import pile, side_by_side, stack
from pytest_kvguard.kv.seam import Seam, Step
from pytest_kvguard.policies.base import EMPTY

GROWTH = 64  # slots added at a time


class RowLayer(Protocol):
    """One layer of R rows."""

    rewindable: bool  # whether what was fed can be forgotten: nothing was evicted or encoded

    @property
    def freed(self) -> Tensor:
        """Slots that were emptied while decoding, over all heads, (R,)."""

    def attend(self, step: Step, asking: Tensor, writing: Tensor) -> Tensor:
        """Write new tokens and attend; asking, writing: (R, Q) positions -> (R, Hq, Q, D).

        ``asking`` is where each token looks from, ``writing`` the same or EMPTY for padding.
        """

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""

    def forget(self, first: Tensor) -> None:
        """Empty the slots of each row from position ``first`` (R,) on."""

    def join(self, others: Sequence[Any]) -> None:
        """Go on with the rows of like layers behind its own."""

    def owned(self, room: int) -> "RowLayer":
        """Return the same rows fit to go on, if they borrowed so far; room: slots at first."""

    @property
    def bytes(self) -> Tensor:
        """Bytes of what each row holds, (R,), room for new tokens left out."""


LayerFactory = Callable[[Sequence[AnyKept]], RowLayer]
"""One layer of every row -> that layer of all rows together."""


class GrowingLayer:
    """One layer of R rows in which everything new stays; ``room``: slots for it at first."""

    rewindable = True

    def __init__(self, kept: Sequence[KeptLayer], room: int = GROWTH) -> None:
        self.window = kept[0].window
        self.used = max(layer.positions.shape[1] for layer in kept)
        slots = self.used + room
        self.keys, self.values = side_by_side(kept, slots)  # (R, Hkv, C, D)
        self.positions = stack([seen_by_all(layer) for layer in kept], slots, EMPTY)  # (R, 1, C)
        self.freed = torch.zeros(len(kept), dtype=torch.long, device=self.keys.device)

    def attend(self, step: Step, asking: Tensor, writing: Tensor) -> Tensor:
        """Append the new tokens and attend in one go."""
        self.append(step.key, step.value, writing)
        keys, values, positions = self.filled
        mask = visible(positions, asking[:, None], self.window)
        return attend(step.query, keys, values, mask, step.scaling)

    @property
    def filled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (R, Hkv, C, D), and positions (R, 1, C), room for more left out."""
        used = slice(self.used)
        return self.keys[:, :, used], self.values[:, :, used], self.positions[:, :, used]

    def append(self, keys: Tensor, values: Tensor, writing: Tensor) -> None:
        """Hold more tokens, (R, Hkv, Q, D), at positions (R, Q)."""
        start, self.used = self.used, self.used + writing.shape[1]
        self._make_room()
        self.keys[:, :, start : self.used] = keys
        self.values[:, :, start : self.used] = values
        self.positions[:, :, start : self.used] = writing[:, None]

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.positions, self.freed = self.positions[rows], self.freed[rows]

    def forget(self, first: Tensor) -> None:
        """Empty the slots of each row from position ``first`` (R,) on."""
        self.positions[self.positions >= first[:, None, None]] = EMPTY

    def join(self, others: Sequence["GrowingLayer"]) -> None:
        """Go on with the rows of other layers behind its own."""
        every = [self, *others]
        slots = max(layer.positions.shape[-1] for layer in every)
        self.used = max(layer.used for layer in every)
        self.keys = pile([layer.keys for layer in every], slots)
        self.values = pile([layer.values for layer in every], slots)
        self.positions = pile([layer.positions for layer in every], slots, EMPTY)
        self.freed = torch.cat([layer.freed for layer in every])

    def owned(self, room: int) -> "GrowingLayer":
        """The layer itself: it borrows nothing."""
        return self

    @property
    def bytes(self) -> Tensor:
        """Bytes of what each row holds, (R,)."""
        return held_bytes(self.positions, self.keys, self.values) * self.keys.shape[1]

    def _make_room(self) -> None:
        more = self.used - self.positions.shape[-1]
        if more > 0:
            more = max(more, GROWTH)
            self.keys = widen(self.keys, more)
            self.values = widen(self.values, more)
            self.positions = F.pad(self.positions, (0, more), value=EMPTY)


class RaggedLayer:
    """One layer of R rows whose heads hold different numbers: each a layer by itself."""

    def __init__(self, kept: Sequence[AnyKept], make: LayerFactory) -> None:
        self.heads = [make(rows) for rows in by_head(kept)]
        self.rewindable = all(head.rewindable for head in self.heads)

    def attend(self, step: Step, asking: Tensor, writing: Tensor) -> Tensor:
        """Write new tokens and attend, head by head."""
        queries = step.query.chunk(len(self.heads), dim=1)
        keys, values = step.key.split(1, dim=1), step.value.split(1, dim=1)
        seen = [
            head.attend(replace(step, query=query, key=key, value=value), asking, writing)
            for head, query, key, value in zip(self.heads, queries, keys, values, strict=True)
        ]
        return torch.cat(seen, dim=1)

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        for head in self.heads:
            head.take(rows)

    def forget(self, first: Tensor) -> None:
        """Empty the slots of each row from position ``first`` (R,) on."""
        for head in self.heads:
            head.forget(first)

    def join(self, others: Sequence["RaggedLayer"]) -> None:
        """Go on with the rows of other layers behind its own, head by head."""
        for head, *more in zip(self.heads, *(layer.heads for layer in others), strict=True):
            head.join(more)

    def owned(self, room: int) -> "RaggedLayer":
        """Have copies of what is kept, if it was borrowed so far."""
        self.heads = [head.owned(room) for head in self.heads]
        return self

    @property
    def freed(self) -> Tensor:
        """Slots that were emptied while decoding, over all heads, (R,)."""
        return torch.stack([head.freed for head in self.heads]).sum(dim=0)

    @property
    def bytes(self) -> Tensor:
        """Bytes of what each row holds, (R,)."""
        return torch.stack([head.bytes for head in self.heads]).sum(dim=0)


def growing(kept: Sequence[AnyKept]) -> RowLayer:
    """Make a layer in which everything new stays."""
    even = [layer for layer in kept if isinstance(layer, KeptLayer)]
    return GrowingLayer(even) if len(even) == len(kept) else RaggedLayer(kept, growing)


def seen_by_all(kept: KeptLayer) -> Tensor:
    """Positions that stand for those of every head, (1, n).

    Heads hold equally many, and all of it comes before what is fed: who sees it does not depend
    on the head. Where a window decides, nothing was evicted and heads hold the same.
    """
    return kept.positions[:1]


class Rows:
    """R rows, each continuing its own prompt."""

    def __init__(self, kept: Sequence[Kept], make: LayerFactory = growing) -> None:
        by_layer = zip(*(row.layers for row in kept), strict=True)
        self.layers = {same[0].layer: make(same) for same in by_layer}
        device = next(iter(self.layers.values())).freed.device
        self.next = torch.tensor([k.length for k in kept], device=device)  # (R,)

    def __len__(self) -> int:
        return len(self.next)

    def feed(self, seam: Seam, tokens: Sequence[Sequence[int]], *, last: int) -> Tensor:
        """Push each row's next tokens through the model.

        Returns the logits of the last ``last`` tokens, (R, last, V); a row with fewer tokens than
        that has its own in the last places.
        """
        width = max(len(row) for row in tokens)
        ids = torch.zeros(len(self), width, dtype=torch.long)
        for row, new in enumerate(tokens):
            ids[row, width - len(new) :] = torch.tensor(new)
        ids = ids.to(self.next.device)
        counts = torch.tensor([len(row) for row in tokens], device=self.next.device)
        offset = torch.arange(width, device=self.next.device) - (width - counts)[:, None]
        # Padding asks from the row's first new position: it sees something, nothing sees it.
        asking = self.next[:, None] + offset.clamp(min=0)
        writing = torch.where(offset >= 0, asking, EMPTY)

        def attending(step: Step) -> Tensor:
            return self.layers[step.layer].attend(step, asking, writing)

        logits = seam.forward(ids, asking, attending, last=last)
        self.next = self.next + counts
        return logits

    @property
    def evicted(self) -> list[int]:
        """How many slots each row emptied while decoding, over all layers and heads."""
        freed = torch.stack([layer.freed for layer in self.layers.values()])  # (layers, R)
        return [int(count) for count in freed.sum(dim=0)]

    @property
    def bytes(self) -> list[int]:
        """Bytes of the keys and values each row holds, over all layers."""
        held = torch.stack([layer.bytes for layer in self.layers.values()])  # (layers, R)
        return [int(size) for size in held.sum(dim=0)]

    @property
    def rewindable(self) -> bool:
        """Whether what a row was fed can be forgotten: nothing was evicted or encoded for it."""
        return all(layer.rewindable for layer in self.layers.values())

    def take(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in the order they have."""
        if len(rows) == len(self):
            return
        index = torch.tensor(rows, device=self.next.device)
        for layer in self.layers.values():
            layer.take(index)
        self.next = self.next[index]

    def rewind(self, to: Sequence[int]) -> None:
        """Forget what each row was fed from position ``to`` on."""
        self.next = torch.tensor(to, device=self.next.device)
        for layer in self.layers.values():
            layer.forget(self.next)

    def join(self, others: Sequence["Rows"]) -> None:
        """Go on with the rows of ``others`` behind its own; these are emptied layer by layer."""
        for index, layer in self.layers.items():
            layer.join([other.layers.pop(index) for other in others])
        self.next = torch.cat([self.next, *(other.next for other in others)])

    def own(self, room: int) -> None:
        """Make borrowed rows fit to go on; ``room``: slots for new tokens at first."""
        self.layers = {index: layer.owned(room) for index, layer in self.layers.items()}


class OneWay:
    """A layer that evicts or encodes: what went is gone."""

    rewindable = False

    def forget(self, first: Tensor) -> None:
        """Raise InvalidArgument."""
        raise InvalidArgument(
            "rows that evict or encode cannot be rewound: what went is gone; start over"
        )

    def join(self, others: Sequence[Any]) -> None:
        """Raise InvalidArgument."""
        raise InvalidArgument("rows that evict or encode cannot be joined; make them together")

    def owned(self, room: int) -> Self:
        """The layer itself: it borrows nothing."""
        return self


def by_head(kept: Sequence[AnyKept]) -> list[tuple[KeptLayer, ...]]:
    """Return for each head what every row keeps of it."""
    return list(zip(*(layer.heads for layer in kept), strict=True))


def held_bytes(positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the bytes of the keys and values in the slots that hold something, (R,)."""
    token = (keys.shape[-1] + values.shape[-1]) * keys.element_size()
    return (positions != EMPTY).sum(dim=(1, 2)) * token


def widen(tensor: Tensor, more: int) -> Tensor:
    """Add slots that hold zeros: (R, Hkv, C, D) -> (R, Hkv, C + more, D)."""
    return F.pad(tensor, (0, 0, 0, more))
