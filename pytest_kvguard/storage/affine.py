"""Round to nearest on an even grid: small whole numbers with a scale and a zero point.

As in KIVI, Liu et al., 2024, https://arxiv.org/abs/2402.02750
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.storage.bits import pack, unpack


@dataclass(frozen=True)
class Affine:
    """Stores x as round((x - zero) / scale), with zero = min and scale = (max - min) / (2^b - 1).

    Tokens and channels are laid out in tiles of ``span`` x ``width``, each with a scale and a
    zero point in the type of what is stored. Codes are packed into bytes, first channel lowest.
    """

    bits: int  # 2, 4 or 8
    span: int = 1  # tokens in a tile
    width: int | None = None  # channels in a tile; None, or more than a head has: all of them

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D): codes (..., units, span, bytes), scale and zero (..., units, tiles).

        Raises InvalidArgument for a head that cannot be cut into tiles or bytes.
        """
        size = tokens.shape[-1]
        width = self._width(size)
        whole = tokens.unflatten(-2, (tokens.shape[-2] // self.span, self.span))
        tiles = whole.unflatten(-1, (size // width, width)).float()
        low, high = tiles.amin(dim=(-3, -1)), tiles.amax(dim=(-3, -1))  # (..., units, tiles)
        most = 2**self.bits - 1
        scale, zero = ((high - low) / most).to(tokens.dtype), low.to(tokens.dtype)
        step = _each(torch.where(scale > 0, scale, 1.0).float())  # a tile all alike is its zero
        codes = ((tiles - _each(zero.float())) / step).round().clamp(0, most)
        return pack(codes.flatten(-2).byte(), self.bits), scale, zero

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D)."""
        packed, scale, zero = parts
        codes = unpack(packed, self.bits).float()
        tiles = codes.unflatten(-1, (scale.shape[-1], codes.shape[-1] // scale.shape[-1]))
        restored = tiles * _each(scale.float()) + _each(zero.float())
        return restored.to(dtype).flatten(-2).flatten(-3, -2)

    def _width(self, size: int) -> int:
        width = min(self.width or size, size)
        if size % width:
            raise InvalidArgument(
                f"heads of {size} channels cannot be cut into groups of {width}; "
                f"use a group that divides {size}"
            )
        if size * self.bits % 8:
            raise InvalidArgument(
                f"heads of {size} channels do not fill whole bytes with {self.bits} bits each; "
                f"use 8 bits"
            )
        return width


def _each(per_tile: Tensor) -> Tensor:
    """Spread one number a tile over its tokens and channels: (..., tiles) -> (..., 1, tiles, 1)."""
    return per_tile.unflatten(-1, (1, -1, 1))
