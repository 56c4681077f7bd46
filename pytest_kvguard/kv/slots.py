"""Slots of R rows, each head with as many as it needs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pytest_kvguard.kv.rope import Rotation


class Slots:
    """The keys, or the values, of R rows in slots that are written again and again.

    Heads that need different numbers lie one behind the other; what is read of them is a copy as
    long as the longest, made for one layer at a time.
    """

    def __init__(self, parts: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> None:
        """Fill from parts[head][row], (1, n, D) each; sizes: slots of each head, n at the most."""
        first = parts[0][0]
        self.sizes = tuple(sizes)
        size = torch.tensor(self.sizes, device=first.device)
        self.last = (size - 1)[:, None]  # (Hkv, 1)
        self.start = (size.cumsum(0) - size)[:, None]  # (Hkv, 1)
        slot = torch.arange(max(self.sizes), device=first.device)
        self.places = self.start + slot.minimum(self.last)  # (Hkv, C), where each slot lies
        # Slots that hold nothing must hold numbers: attention weight 0 times nan would be nan.
        self.flat = first.new_zeros(len(parts[0]), sum(self.sizes), first.shape[-1])
        for rows, head in zip(parts, self.flat.split(self.sizes, dim=1), strict=True):
            for row, part in enumerate(rows):
                head[row, : part.shape[1]] = part[0]

    def read(self) -> Tensor:
        """Return what the slots hold, (R, Hkv, C, D); behind a shorter head it means nothing."""
        if len(set(self.sizes)) == 1:
            return self.flat.unflatten(1, self.places.shape)
        return self.flat[:, self.places]

    def write(self, slot: Tensor, new: Tensor, real: Tensor) -> None:
        """Put one token a row into a slot of each head, where ``real`` (R, 1, 1).

        slot: (R, Hkv, 1); new: (R, Hkv, 1, D)
        """
        index = (self.start + slot.minimum(self.last)).expand(-1, -1, self.flat.shape[-1])
        now = torch.where(real, new.squeeze(2), self.flat.gather(1, index))
        self.flat.scatter_(1, index, now)

    def turn(self, rotation: Rotation, by: Tensor) -> None:
        """Turn the key in each slot by a number of positions, (R, Hkv, C)."""
        flat = [by[:, head, :size] for head, size in enumerate(self.sizes)]
        self.flat = rotation.turn(self.flat, torch.cat(flat, dim=1))

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.flat = self.flat[rows]
