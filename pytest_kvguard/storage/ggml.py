"""ggml blocks: store keys and values as llama.cpp does, each in blocks of 32 channels.

`--cache-type-k` and `--cache-type-v` of https://github.com/ggml-org/llama.cpp, as in the
`quantize_row_*_ref` of ggml/src/ggml-quants.c:

q8_0       codes -127 ... 127 and a scale d = max |x| / 127; 34 bytes a block
q4_0       codes 0 ... 15 of x / d + 8 with d = m / -8, m: the number of largest size with its
           sign; 18 bytes
q5_0       codes 0 ... 31 of x / d + 16 with d = m / -16; 22 bytes
q4_1       codes 0 ... 15 of (x - min) / d with d = (max - min) / 15, and min; 20 bytes
q5_1       codes 0 ... 31, with d = (max - min) / 31, and min; 24 bytes
iq4_nl     the nearest of 16 uneven levels to -127 x / m, and the scale of least squares, weighed
           by x^2; 18 bytes
f16        16-bit floats

Scales and minima are 16-bit floats, codes are found before these are rounded. With `rotate`, keys
and values are multiplied by a Hadamard matrix before, as llama.cpp does since
https://github.com/ggml-org/llama.cpp/pull/21038 unless LLAMA_ATTN_ROT_DISABLE is set: keys in
pieces of the largest power of two that divides the head, values in pieces of 64, and neither where
the head is no multiple of 64.

Differs from llama.cpp: its prefill attends to what it has stored, here the prefill is in full
precision. On some processors its kernels round halves of q8_0 to even; here, as in the reference,
they go away from zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.parameters import check_choice, check_flag, frozen
from pytest_kvguard.storage.base import Codec, Storage
from pytest_kvguard.storage.constants import table
from pytest_kvguard.storage.rotation import Rotated

BLOCK = 32
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MIDDLES = tuple((one + other) / 2 for one, other in pairwise(LEVELS))


@dataclass(frozen=True)
class Half:
    """Stores 16-bit floats."""

    span: int = 1

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D)."""
        return (tokens.half(),)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D)."""
        return parts[0].to(dtype)


@dataclass(frozen=True)
class Q8:
    """q8_0: x = d * code."""

    span: int = 1

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D): codes (..., n, D) int8 and scales (..., n, D / 32) float16."""
        x = blocks(tokens)
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        steps = x * inverse(scale)
        codes = (steps.abs() + 0.5).floor().copysign(steps)  # halves away from zero, as roundf
        return codes.to(torch.int8).flatten(-2), scale.half().squeeze(-1)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D)."""
        codes, scale = parts
        return (blocks(codes) * scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


@dataclass(frozen=True)
class Symmetric:
    """q4_0 and q5_0: x = d * (code - 2^(bits - 1)), where d has the sign of what is largest."""

    bits: int  # 4 or 5
    span: int = 1

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D): packed codes and scales (..., n, D / 32) float16."""
        x, half = blocks(tokens), 2 ** (self.bits - 1)
        scale = largest(x) / -half
        codes = (x * inverse(scale) + (half + 0.5)).floor().clamp(0, 2 * half - 1)
        return *pack(codes.byte(), self.bits), scale.half().squeeze(-1)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D)."""
        *packed, scale = parts
        codes = unpack(packed).float() - 2 ** (self.bits - 1)
        return (codes * scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


@dataclass(frozen=True)
class Asymmetric:
    """q4_1 and q5_1: x = d * code + min."""

    bits: int  # 4 or 5
    span: int = 1

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D): packed codes, scales and minima (..., n, D / 32) float16."""
        x, most = blocks(tokens), 2**self.bits - 1
        low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
        scale = (high - low) / most
        codes = ((x - low) * inverse(scale) + 0.5).floor().clamp(0, most)
        packed = pack(codes.byte(), self.bits)
        return *packed, scale.half().squeeze(-1), low.half().squeeze(-1)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D)."""
        *packed, scale, low = parts
        codes = unpack(packed).float()
        x = codes * scale.float().unsqueeze(-1) + low.float().unsqueeze(-1)
        return x.flatten(-2).to(dtype)


@dataclass(frozen=True)
class Uneven:
    """iq4_nl: x = d * one of 16 levels."""

    span: int = 1

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D): packed codes and scales (..., n, D / 32) float16."""
        x = blocks(tokens)
        near = (x * inverse(largest(x) / LEVELS[0])).contiguous()
        codes = torch.bucketize(near, table(MIDDLES, x.device), right=True)
        level, weight = table(LEVELS, x.device)[codes], x * x
        norm = (weight * level * level).sum(dim=-1, keepdim=True)
        fitted = (weight * level * x).sum(dim=-1, keepdim=True) / torch.where(norm > 0, norm, 1.0)
        return *pack(codes.byte(), 4), fitted.half().squeeze(-1)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D)."""
        *packed, scale = parts
        level = table(LEVELS, scale.device)[unpack(packed).int()]
        return (level * scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


TYPES: dict[str, Codec] = {
    "f16": Half(),
    "q8_0": Q8(),
    "q5_1": Asymmetric(5),
    "q5_0": Symmetric(5),
    "q4_1": Asymmetric(4),
    "q4_0": Symmetric(4),
    "iq4_nl": Uneven(),
}
"""What llama.cpp calls them."""


def llamacpp(keys: str = "q8_0", values: str = "q8_0", rotate: bool = True) -> Storage:
    """Store ``keys`` and ``values`` in a type each; ``rotate``: as llama.cpp does by default."""
    keys, values = check_choice("keys", keys, (*TYPES,)), check_choice("values", values, (*TYPES,))
    turn = check_flag("rotate", rotate)
    return Storage(
        keys=_codec(keys, turn, wide=True),
        values=_codec(values, turn, wide=False),
        params=frozen(keys=keys, values=values, rotate=rotate),
    )


def _codec(kind: str, rotate: bool, *, wide: bool) -> Codec:
    return Rotated(TYPES[kind], wide) if rotate and kind != "f16" else TYPES[kind]


def _preset(kind: str) -> Callable[..., Storage]:
    def preset(values: str | None = None, rotate: bool = True) -> Storage:
        return llamacpp(kind, kind if values is None else values, rotate)

    preset.__name__ = kind
    preset.__doc__ = f"Store keys in {kind} and ``values`` likewise, or in a type of their own."
    return preset


GGML: dict[str, Callable[..., Storage]] = {
    "llamacpp": llamacpp,
    **{kind: _preset(kind) for kind in TYPES if kind != "f16"},
}
"""llama.cpp's formats by name."""


def blocks(tokens: Tensor) -> Tensor:
    """Cut (..., D) into (..., D / 32, 32) float32; InvalidArgument where that leaves a rest."""
    size = tokens.shape[-1]
    if size % BLOCK:
        raise InvalidArgument(
            f"heads of {size} channels cannot be cut into blocks of {BLOCK}, and llama.cpp "
            f"refuses them too; use a format that takes any head size, such as int8"
        )
    return tokens.float().unflatten(-1, (size // BLOCK, BLOCK))


def largest(x: Tensor) -> Tensor:
    """Return the number of largest size in each block with its sign, of equals the first."""
    return x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))


def inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def pack(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Pack codes (..., B, 32) uint8: channels j and j + 16 share a byte, j lowest, (..., B * 16).

    Fifth bits come apart, a bit a channel, first channel lowest, (..., B * 4).
    """
    low, high = codes.chunk(2, dim=-1)
    nibbles = ((low & 15) | (high & 15) << 4).flatten(-2)
    if bits == 4:
        return (nibbles,)
    place = torch.arange(8, device=codes.device, dtype=torch.uint8)
    fifth = ((codes >> 4).unflatten(-1, (4, 8)) << place).sum(dim=-1, dtype=torch.uint8)
    return nibbles, fifth.flatten(-2)


def unpack(packed: Sequence[Tensor]) -> Tensor:
    """Undo `pack`."""
    nibbles = packed[0].unflatten(-1, (-1, BLOCK // 2))
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)
    if len(packed) == 1:
        return codes
    place = torch.arange(8, device=codes.device, dtype=torch.uint8)
    fifth = (packed[1].unflatten(-1, (-1, 4, 1)) >> place) & 1
    return codes | fifth.flatten(-2) << 4
