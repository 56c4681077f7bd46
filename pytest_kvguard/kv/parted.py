"""Rows in several layers, each with those that go well together."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pytest_kvguard.kv.rows import RowLayer
from pytest_kvguard.kv.seam import Step

ALIKE = 0.9
"""Rows attend side by side where the shortest is this share of the longest: padding costs."""


class PartedLayer:
    """One layer of R rows, made of layers of some of them."""

    def __init__(self, parts: Sequence[tuple[Tensor, RowLayer]]) -> None:
        """parts: the indices of rows and a layer of these; every row is in one of them."""
        self.parts = list(parts)
        self.rewindable = all(layer.rewindable for _, layer in parts)

    def attend(self, step: Step, asking: Tensor, writing: Tensor) -> Tensor:
        """Write new tokens and attend, part by part."""
        out = torch.empty_like(step.query)
        for rows, layer in self.parts:
            own = replace(step, query=step.query[rows], key=step.key[rows], value=step.value[rows])
            out[rows] = layer.attend(own, asking[rows], writing[rows])
        return out

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        place = torch.full((len(self.freed),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        parts, self.parts = self.parts, []
        for mine, layer in parts:
            stay = (place[mine] >= 0).nonzero().flatten()
            if len(stay) < len(mine):
                layer.take(stay)
            if len(stay):
                self.parts.append((place[mine[stay]], layer))

    def forget(self, first: Tensor) -> None:
        """Empty the slots of each row from position ``first`` (R,) on."""
        for rows, layer in self.parts:
            layer.forget(first[rows])

    def join(self, others: Sequence["PartedLayer"]) -> None:
        """Go on with the rows of other layers behind its own."""
        for other in others:
            before = len(self.freed)
            self.parts += [(rows + before, layer) for rows, layer in other.parts]

    def owned(self, room: int) -> "PartedLayer":
        """Have copies of what is kept, if it was borrowed so far."""
        self.parts = [(rows, layer.owned(room)) for rows, layer in self.parts]
        return self

    @property
    def freed(self) -> Tensor:
        """Slots that were emptied while decoding, over all heads, (R,)."""
        return self._by_row([layer.freed for _, layer in self.parts])

    @property
    def bytes(self) -> Tensor:
        """Bytes of what each row holds, (R,)."""
        return self._by_row([layer.bytes for _, layer in self.parts])

    def _by_row(self, found: Sequence[Tensor]) -> Tensor:
        order = torch.cat([rows for rows, _ in self.parts])
        return torch.cat(list(found))[order.argsort()]


def alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Group indices of like lengths, the longest first."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if group and lengths[index] < ALIKE * lengths[group[0]]:
            yield group
            group = []
        group.append(index)
    yield group
