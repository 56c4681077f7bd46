"""Hadamard rotation: spread outlier channels over a head before it is encoded.

The normalized Walsh-Hadamard matrix is symmetric and its own inverse, so a query that is rotated
as well, as in serving engines, and a key that is rotated back, as here, give the same products.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kvguard.storage.base import Codec
from pytest_kvguard.storage.constants import held


def hadamard(size: int) -> Tensor:
    """Return the normalized Walsh-Hadamard matrix, (size, size); size: a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([matrix.repeat(1, 2), torch.cat([matrix, -matrix], dim=1)])
    return matrix / math.sqrt(size)


def rotated(tokens: Tensor, size: int) -> Tensor:
    """Rotate each ``size`` neighbouring channels of (..., D) float32."""
    matrix = held(("hadamard", size), tokens.device, lambda: hadamard(size))
    return (tokens.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


@dataclass(frozen=True)
class Rotated:
    """Rotates tokens before another codec encodes them, and back; as llama.cpp does.

    Heads whose size is no multiple of 64 are left alone. The others are cut into pieces of 64, or
    with ``wide`` of the largest power of two that divides their size.
    """

    codec: Codec
    wide: bool

    @property
    def span(self) -> int:
        """How many neighbouring tokens are encoded together."""
        return self.codec.span

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D), rotated."""
        size = self.piece(tokens.shape[-1])
        return self.codec.encode(rotated(tokens.float(), size) if size else tokens)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D)."""
        tokens = self.codec.decode(parts, torch.float32)
        size = self.piece(tokens.shape[-1])
        return (rotated(tokens, size) if size else tokens).to(dtype)

    def piece(self, size: int) -> int:
        """Say how many channels of a head are rotated together, 0 for none."""
        if size % 64:
            return 0
        return size & -size if self.wide else 64
