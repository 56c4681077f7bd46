"""Rows that read a draft: what they keep is gathered for one layer at a time, then dropped."""

import torch
from torch import Tensor

from pytest_kvguard.engine.attention import AttentionCall, attend, bias_of, visible
from pytest_kvguard.engine.cache.base import Cursor, LayerCache, Rows, aligned
from pytest_kvguard.engine.stack import StackLayer
from pytest_kvguard.policies.base import EMPTY


class DraftCache(LayerCache):
    """One layer of R rows that make one pass over many tokens.

    Most rows make this pass and no other, so copies of all they keep would be for nothing. The
    new tokens' keys and values stay: a row that goes on begins with them.
    """

    def __init__(self, rows: Rows, layer: StackLayer, index: int, cursor: Cursor) -> None:
        self.rows, self.layer, self.index = rows, layer, index
        self.keys, self.values = layer.keys[:0], layer.values[:0]  # (R, Hkv, Q, D), of new tokens

    def attend(self, call: AttentionCall, asking: Tensor, real: Tensor | None) -> Tensor:
        """Attend to what each row keeps, and to the new tokens."""
        self.keys, self.values = call.key, call.value
        places = self.rows.places(self.layer, self.index)
        if self.rows.even(self.layer, self.index):
            places = places[:, :1]  # who sees them does not depend on the head
        most, width = places.shape[-1], call.key.shape[2]
        slots = aligned(most + width, call.key.device)
        keys, values = self.rows.copy(self.layer, self.index, slots)
        keys[:, :, most : most + width], values[:, :, most : most + width] = call.key, call.value
        positions = places.new_full((*places.shape[:2], slots), EMPTY)
        positions[..., :most] = places
        writing = asking if real is None else torch.where(real, asking, EMPTY)
        positions[..., most : most + width] = writing[:, None]
        bias = bias_of(visible(positions, asking[:, None], call.window), call.query.dtype)
        return attend(call.query, keys, values, bias, call.scoring)

    def take(self, rows: Tensor) -> None:
        """Draft rows are read and done with."""
        raise AssertionError("rows that go on after their draft are made anew")

    def grow(self, more: int) -> None:
        """Nothing is written, so there is no room to make."""
