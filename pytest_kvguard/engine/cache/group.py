"""Rows that hold their caches in the same way: a cache for each layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pytest_kvguard.engine.cache.base import Cursor, LayerCache, Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.shared import SharedPrefixCache
from pytest_kvguard.engine.stack import StackLayer

MakeCache = Callable[[Rows, StackLayer, int, Cursor], LayerCache]
"""rows, layer, its index among the compressible ones (-1: sliding), cursor -> the layer's cache."""


New = dict[int, tuple[Tensor, Tensor]]
"""By layer, keys and values (Hkv, n, D) of tokens that were fed."""


class GroupFailed(Exception):
    """A policy's or codec's code raised while rows of one group were made or attended."""

    def __init__(self, cells: frozenset[int]) -> None:
        super().__init__(cells)
        self.cells = cells  # whose rows they are


@contextmanager
def blamed_on(cells: frozenset[int] | None) -> Iterator[None]:
    """Raise GroupFailed for what goes wrong in code of a policy or a codec, if any runs."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        if cells is None:
            raise
        raise GroupFailed(cells) from problem


@dataclass
class Group:
    """Rows that hold their caches in the same way: a cache for each layer."""

    caches: dict[int, LayerCache]  # by the model's index of the layer
    rows: int
    cursor: Cursor
    cells: frozenset[int] | None = None
    """Cells whose code, a policy's or a codec's, runs in its caches; None: only ours does."""

    @classmethod
    def of(
        cls,
        rows: Rows,
        make: MakeCache,
        *,
        sliding: MakeCache | None = None,
        capacity: int = 0,
        cells: frozenset[int] | None = None,
    ) -> "Group":
        """Make the caches of a group. sliding: for layers that are left alone; like the others."""
        stack, cursor = rows.kept[0].prefill.stack, Cursor(capacity)
        caches, index = {}, 0
        for layer in stack.layers.values():
            if layer.window is None:
                caches[layer.layer] = make(rows, layer, index, cursor)
                index += 1
            else:
                caches[layer.layer] = (sliding or make)(rows, layer, -1, cursor)
        return cls(caches, len(rows), cursor, cells)

    def take(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self.rows = len(rows)
        for cache in self.caches.values():
            cache.take(torch.tensor(rows, device=cache.device))

    def grow(self, more: int) -> None:
        """Make room for ``more`` new tokens."""
        self.cursor.capacity += more
        for cache in self.caches.values():
            cache.grow(more)

    def begin(self, new: Sequence[New], start: Sequence[int]) -> None:
        """Hold tokens that were fed before: by row, by layer keys and values (Hkv, n, D).

        start: the position of each row's first of them. For rows in which everything new stays.
        """
        counts = [next(iter(row.values()))[0].shape[1] for row in new]
        offset = torch.arange(max(counts))
        real = offset < torch.tensor(counts)[:, None]
        at = torch.tensor(list(start))[:, None] + offset
        for index, cache in self.caches.items():
            assert isinstance(cache, DenseCache | SharedPrefixCache)
            keys, values = (
                pad_sequence([row[index][which].transpose(0, 1) for row in new], batch_first=True)
                for which in (0, 1)
            )
            device = cache.device
            pair = keys.transpose(1, 2), values.transpose(1, 2)
            cache.begin(*pair, at.to(device), real.to(device))
        self.cursor.advance(max(counts))
