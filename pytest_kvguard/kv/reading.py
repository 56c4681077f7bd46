"""Rows that hold everything and read a few pages of it, chosen anew for each query.

A slot's index is its position, so pages are runs of slots. A query reads the page it stands in
and the best of those before, which are full by then: it makes no difference whether tokens come
one by one or several in a pass.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.kv.attention import attend, visible
from pytest_kvguard.kv.compress import AnyKept, KeptLayer
from pytest_kvguard.kv.rows import GROWTH, GrowingLayer, LayerFactory, RowLayer, growing, widen
from pytest_kvguard.kv.seam import Step
from pytest_kvguard.policies.base import EMPTY, Reading

ALL = 2**31
"""More pages than there ever are."""


class ReadingLayer(GrowingLayer):
    """One layer of R rows, of which each query reads at most ``pages`` (R,).

    Raises InvalidArgument where something was evicted: then slots are not positions.
    """

    def __init__(self, kept: Sequence[KeptLayer], reading: Reading, pages: Tensor) -> None:
        super().__init__(kept)
        slot = torch.arange(self.positions.shape[-1], device=self.positions.device)
        if any((layer.positions != slot[: layer.positions.shape[-1]]).any() for layer in kept):
            raise InvalidArgument(
                "what is read in pages must be held in full; do not evict as well"
            )
        self.reading, self.pages = reading, pages
        self.read = torch.zeros(len(kept), dtype=torch.float64, device=slot.device)  # (R,) shares
        self.steps = torch.zeros(len(kept), dtype=torch.long, device=slot.device)

    def attend(self, step: Step, asking: Tensor, writing: Tensor) -> Tensor:
        """Write the new tokens and attend in one go, each query to its own pages."""
        self._put(step.key, step.value, writing)
        seen = visible(self.positions, asking[:, None])  # (R, 1, Q, C)
        chosen = self._choose(step.query, asking)  # (R, Hq, Q, P)
        mask = seen & chosen.repeat_interleave(self.reading.page, dim=-1)
        share = mask.sum(dim=-1).double().mean(dim=1) / seen[:, 0].sum(dim=-1)  # (R, Q)
        real = writing != EMPTY
        self.read += torch.where(real, share, 0.0).sum(dim=1)
        self.steps += real.sum(dim=1)
        return attend(step.query, self.keys, self.values, mask, step.scaling)

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        super().take(rows)
        self.pages, self.read, self.steps = self.pages[rows], self.read[rows], self.steps[rows]

    def join(self, others: Sequence["ReadingLayer"]) -> None:  # type: ignore[override] # its like
        """Go on with the rows of other layers behind its own."""
        super().join(others)
        every = [self, *others]
        self.pages = torch.cat([layer.pages for layer in every])
        self.read = torch.cat([layer.read for layer in every])
        self.steps = torch.cat([layer.steps for layer in every])

    def _put(self, key: Tensor, value: Tensor, writing: Tensor) -> None:
        """Write each new token where its position says; padding is dropped."""
        slots, needed = self.positions.shape[-1], int(writing.max()) + 1
        if needed > slots or slots % self.reading.page:
            more = -(-(needed + GROWTH) // self.reading.page) * self.reading.page - slots
            self.keys, self.values = widen(self.keys, more), widen(self.values, more)
            self.positions = F.pad(self.positions, (0, more), value=EMPTY)
        row, token = (writing != EMPTY).nonzero(as_tuple=True)
        place = writing[row, token]
        self.keys[row, :, place] = key[row, :, token]
        self.values[row, :, place] = value[row, :, token]
        self.positions[row, :, place] = place[:, None]

    def _choose(self, query: Tensor, asking: Tensor) -> Tensor:
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


def reading(how: Reading, pages: Tensor) -> LayerFactory:
    """Make the layers of rows that read ``pages`` (R,); sliding layers are left alone."""

    def make(kept: Sequence[AnyKept]) -> RowLayer:
        if kept[0].window is not None:
            return growing(kept)
        dense = kept[0].layer < how.dense
        most = torch.full_like(pages, ALL) if dense else pages
        return ReadingLayer([layer.padded for layer in kept], how, most)

    return make


def read_shares(layers: Sequence[RowLayer]) -> list[float] | None:
    """Return what each row read so far: positions read / held, mean over steps, layers and heads.

    None where everything held is read.
    """
    choosy = [layer for layer in layers if isinstance(layer, ReadingLayer)]
    if not choosy:
        return None
    return torch.stack([layer.read / layer.steps for layer in choosy]).mean(dim=0).tolist()
