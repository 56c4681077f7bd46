"""Rows that look at what they keep where the prefill has it: most make one pass, over a draft.

They get copies one layer at a time, each made where the last one was: no memory is asked for
that the process has not had before. Rows that write on are made to do so by `owned`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.kv.attention import attend, visible
from pytest_kvguard.kv.compress import AnyKept, KeptLayer
from pytest_kvguard.kv.parted import PartedLayer, alike
from pytest_kvguard.kv.piles import side_by_side, stack
from pytest_kvguard.kv.rows import GrowingLayer, RaggedLayer, RowLayer, seen_by_all
from pytest_kvguard.kv.seam import Step
from pytest_kvguard.kv.sharing import SharingLayer, worth_sharing
from pytest_kvguard.policies.base import EMPTY


class BorrowingLayer:
    """One layer of R rows in which everything new stays, beside what was kept elsewhere."""

    rewindable = True

    def __init__(self, kept: Sequence[KeptLayer]) -> None:
        keys, values = kept[0].source.keys, kept[0].source.values
        heads, rows = len(keys), len(kept)
        self.kept = list(kept)
        self.window = kept[0].window
        self.keys = keys.new_empty(rows, heads, 0, keys.shape[-1])  # of what is new
        self.values = values.new_empty(rows, heads, 0, values.shape[-1])
        self.positions = torch.empty(rows, 0, dtype=torch.long, device=keys.device)
        self.freed = torch.zeros(rows, dtype=torch.long, device=keys.device)

    def attend(self, step: Step, asking: Tensor, writing: Tensor) -> Tensor:
        """Append the new tokens and attend, rows of like length side by side."""
        self.keys = torch.cat([self.keys, step.key], dim=2)
        self.values = torch.cat([self.values, step.value], dim=2)
        self.positions = torch.cat([self.positions, writing], dim=1)
        out = torch.empty_like(step.query)
        for group in alike([layer.positions.shape[1] for layer in self.kept]):
            rows = sorted(group)  # those of one prefill follow one another
            kept = [self.kept[row] for row in rows]
            most = max(layer.positions.shape[1] for layer in kept)
            slots = most + self.positions.shape[1]
            keys, values = side_by_side(kept, slots)
            keys[:, :, most:], values[:, :, most:] = self.keys[rows], self.values[rows]
            positions = stack([seen_by_all(layer) for layer in kept], slots, EMPTY)
            positions[:, :, most:] = self.positions[rows].unsqueeze(1)
            mask = visible(positions, asking[rows].unsqueeze(1), self.window)
            out[rows] = attend(step.query[rows], keys, values, mask, step.scaling)
        return out

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.kept = [self.kept[row] for row in rows.tolist()]
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.positions, self.freed = self.positions[rows], self.freed[rows]

    def forget(self, first: Tensor) -> None:
        """Empty the slots of each row from position ``first`` (R,) on."""
        self.positions[self.positions >= first[:, None]] = EMPTY

    def join(self, others: Sequence["BorrowingLayer"]) -> None:
        """Go on with the rows of other layers behind its own."""
        every = [self, *others]
        self.kept = [kept for layer in every for kept in layer.kept]
        most = max(layer.positions.shape[1] for layer in every)
        more = [most - layer.positions.shape[1] for layer in every]
        wide = list(zip(every, more, strict=True))
        self.keys = torch.cat([F.pad(layer.keys, (0, 0, 0, n)) for layer, n in wide])
        self.values = torch.cat([F.pad(layer.values, (0, 0, 0, n)) for layer, n in wide])
        positions = [F.pad(layer.positions, (0, n), value=EMPTY) for layer, n in wide]
        self.positions = torch.cat(positions)
        self.freed = torch.cat([layer.freed for layer in every])

    @property
    def bytes(self) -> Tensor:
        """Bytes of what each row would hold if it were its own, (R,)."""
        token = (self.keys.shape[-1] + self.values.shape[-1]) * self.keys.element_size()
        new = (self.positions != EMPTY).sum(dim=1) * token * self.keys.shape[1]
        return new + torch.tensor([layer.bytes for layer in self.kept], device=new.device)

    def owned(self, room: int) -> RowLayer:
        """Return the same rows fit to go on: they share a prefill, or have copies with room."""
        sharing, alone = worth_sharing(self.kept)
        lengths = [self.kept[row].positions.shape[1] for row in alone]
        groups = [[alone[at] for at in group] for group in alike(lengths)] if alone else []
        room += self.positions.shape[1]
        parts: list[tuple[Tensor, RowLayer]] = []
        for rows in [*sharing, *groups]:
            kept = [self.kept[row] for row in rows]
            layer = SharingLayer(kept, room) if rows in sharing else GrowingLayer(kept, room)
            layer.append(self.keys[rows], self.values[rows], self.positions[rows])
            parts.append((torch.tensor(rows, device=self.freed.device), layer))
        return PartedLayer(parts)


def borrowing(kept: Sequence[AnyKept]) -> RowLayer:
    """Make a layer that borrows what is kept."""
    even = [layer for layer in kept if isinstance(layer, KeptLayer)]
    return BorrowingLayer(even) if len(even) == len(kept) else RaggedLayer(kept, borrowing)
