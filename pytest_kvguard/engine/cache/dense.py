"""Rows in which everything new stays, each with a copy of what it keeps and room for more."""

import torch
from torch import Tensor

from pytest_kvguard.engine.attention import AttentionCall, attend, bias_of, visible
from pytest_kvguard.engine.cache.base import Cursor, LayerCache, Rows, aligned, widened
from pytest_kvguard.engine.stack import StackLayer
from pytest_kvguard.policies.base import EMPTY


class DenseCache(LayerCache):
    """One layer of R rows, padded to the longest; new tokens are appended."""

    def __init__(self, rows: Rows, layer: StackLayer, index: int, cursor: Cursor) -> None:
        self.cursor = cursor
        self.start = rows.most(layer, index)  # the first slot for new tokens
        slots = aligned(self.start + cursor.capacity, layer.keys.device)
        self.keys, self.values = rows.copy(layer, index, slots)  # (R, Hkv, C, D)
        places = rows.places(layer, index)
        if rows.even(layer, index):
            places = places[:, :1]  # who sees them does not depend on the head
        self.positions = widened(places, slots - self.start, -1, EMPTY)  # (R, Hkv or 1, C)
        self.bias = bias_of(self.positions != EMPTY, layer.keys.dtype).unsqueeze(2)

    def attend(self, call: AttentionCall, asking: Tensor, real: Tensor | None) -> Tensor:
        """Append the new tokens and attend in one go."""
        width = asking.shape[1]
        slots = self.cursor.slots(asking.device, width) + self.start
        self.write(slots, call.key, call.value, asking, real)
        if width == 1 and call.window is None:  # all there is came before
            bias = self.bias
        else:
            seen = visible(self.positions, asking[:, None], call.window)
            bias = bias_of(seen, call.query.dtype)
        return attend(call.query, self.keys, self.values, bias, call.scoring)

    def begin(self, keys: Tensor, values: Tensor, at: Tensor, real: Tensor) -> None:
        """Hold tokens (R, Hkv, n, D) that were fed before, at positions (R, n)."""
        slots = self.cursor.slots(at.device, at.shape[1]) + self.start
        self.write(slots, keys, values, at, real)

    def write(
        self, slots: Tensor, keys: Tensor, values: Tensor, at: Tensor, real: Tensor | None
    ) -> None:
        """Hold new tokens (R, Hkv, Q, D) at positions (R, Q); padding is never seen."""
        at = at if real is None else torch.where(real, at, EMPTY)
        self.keys.index_copy_(2, slots, keys)
        self.values.index_copy_(2, slots, values)
        self.positions.index_copy_(2, slots, at[:, None].expand(-1, self.positions.shape[1], -1))
        if real is None:
            self.bias.index_fill_(3, slots, 0.0)
        else:
            new = bias_of(real, self.bias.dtype)[:, None, None]
            self.bias.index_copy_(3, slots, new.expand(-1, self.bias.shape[1], -1, -1))

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.positions, self.bias = self.positions[rows], self.bias[rows]

    def grow(self, more: int) -> None:
        """Make room for ``more`` new tokens."""
        self.keys, self.values = widened(self.keys, more, -2), widened(self.values, more, -2)
        self.positions = widened(self.positions, more, -1, EMPTY)
        self.bias = widened(self.bias, more, -1, float("-inf"))
