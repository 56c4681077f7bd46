"""Rows that hold everything and read a few pages of it, chosen anew for each query.

A slot's index is its position, so pages are runs of slots. A query reads the page it stands in
and the best of those before, which are full by then: it makes no difference whether tokens come
one by one or several in a pass.
"""

import torch
from torch import Tensor

from pytest_kvguard.engine.attention import AttentionCall, attend, bias_of, visible
from pytest_kvguard.engine.cache.base import Cursor, LayerCache, Rows, widened
from pytest_kvguard.engine.stack import StackLayer
from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies.base import EMPTY, Reading

ALL = 2**31
"""More pages than there ever are."""


class PagedCache(LayerCache):
    """One layer of R rows, of which each query reads at most ``pages`` (R,).

    Raises InvalidArgument where something was evicted: then slots are not positions.
    """

    def __init__(
        self,
        rows: Rows,
        layer: StackLayer,
        index: int,
        cursor: Cursor,
        reading: Reading,
        pages: Tensor,
    ) -> None:
        if not all(kept.whole for kept in rows.kept):
            raise InvalidArgument(
                "what is read in pages must be held in full; do not evict as well"
            )
        device, page = layer.keys.device, reading.page
        self.reading = reading
        self.pages = pages.to(device)
        if layer.layer < reading.dense:
            self.pages = torch.full_like(self.pages, ALL)
        held = rows.most(layer, index)
        slots = (-(-(held + cursor.capacity) // page) + 1) * page  # padding goes to the last page
        self.keys, self.values = rows.copy(layer, index, slots)  # (R, Hkv, C, D)
        places = rows.places(layer, index)[:, :1]
        self.positions = widened(places, slots - held, -1, EMPTY)  # (R, 1, C)
        self._read = torch.zeros(len(rows), dtype=torch.float64, device=device)  # sum of shares
        self.steps = torch.zeros(len(rows), dtype=torch.long, device=device)

    def attend(self, call: AttentionCall, asking: Tensor, real: Tensor | None) -> Tensor:
        """Write the new tokens and attend in one go, each query to its own pages."""
        writing = asking if real is None else torch.where(real, asking, EMPTY)
        self._write(call.key, call.value, writing)
        seen = visible(self.positions, asking[:, None])  # (R, 1, Q, C)
        chosen = self.choose(call.query, asking)  # (R, Hq, Q, P)
        mask = seen & chosen.repeat_interleave(self.reading.page, dim=-1)
        share = mask.sum(dim=-1).double().mean(dim=1) / seen[:, 0].sum(dim=-1)  # (R, Q)
        counted = writing != EMPTY
        self._read += share.masked_fill(~counted, 0.0).sum(dim=1)
        self.steps += counted.sum(dim=1)
        bias = bias_of(mask, call.query.dtype)
        return attend(call.query, self.keys, self.values, bias, call.scoring)

    @property
    def read(self) -> Tensor:
        """Share of what is held that each row read so far, mean over tokens, (R,) float64."""
        return self._read / self.steps

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.positions, self.pages = self.positions[rows], self.pages[rows]
        self._read, self.steps = self._read[rows], self.steps[rows]

    def grow(self, more: int) -> None:
        """Make room for ``more`` new tokens."""
        more = -(-more // self.reading.page) * self.reading.page
        self.keys, self.values = widened(self.keys, more, -2), widened(self.values, more, -2)
        self.positions = widened(self.positions, more, -1, EMPTY)

    def _write(self, key: Tensor, value: Tensor, writing: Tensor) -> None:
        """Write each new token where its position says, and padding where nobody looks."""
        place = writing.masked_fill(writing == EMPTY, self.keys.shape[2] - 1)[:, None]  # (R, 1, Q)
        spot = place.unsqueeze(-1).expand(-1, key.shape[1], -1, -1)
        self.keys.scatter_(2, spot.expand(-1, -1, -1, key.shape[-1]), key)
        self.values.scatter_(2, spot.expand(-1, -1, -1, value.shape[-1]), value)
        self.positions.scatter_(2, place, writing[:, None])

    def choose(self, query: Tensor, asking: Tensor) -> Tensor:
        """Choose the pages each query reads, (R, Hq, Q, P) bool; of equals the first."""
        by_page = self.keys.unflatten(2, (-1, self.reading.page))
        rating = self.reading.rate(query, by_page.amin(dim=3), by_page.amax(dim=3))
        page = torch.arange(rating.shape[-1], device=rating.device)
        own = (asking // self.reading.page)[:, None, :, None]  # (R, 1, Q, 1)
        before = page < own
        rating = rating.masked_fill(~before, float("-inf"))
        place = rating.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        best = place < self.pages[:, None, None, None] - 1
        return (before & best) | (page == own)
