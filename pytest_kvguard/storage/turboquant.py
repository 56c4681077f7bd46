"""TurboQuant: store keys rotated, as levels made for a normal distribution, and values uniformly.

vLLM's `--kv-cache-dtype turboquant_*`, https://github.com/vllm-project/vllm/pull/38479, after
Zandieh et al., 2025, https://arxiv.org/abs/2504.19874; the scalar case of HIGGS, Malinovskii et
al., 2024, https://arxiv.org/abs/2411.17525

keys       scaled to norm 1 and rotated by a Hadamard matrix, each channel becomes the nearest of
           2^bits levels, those of Lloyd-Max for N(0, 1 / D); with the norm, a 16-bit float. With
           `correct`, the levels of a token are scaled to norm 1 again when they are read. In 8
           bits: 8-bit floats (E4M3) instead, neither scaled nor rotated
values     codes of (x - min) / scale, scale = (max - min) / (2^bits - 1), halves up; with scale and
           min, 16-bit floats

The first and the last `skip` layers stay as they are, at most half of them either way.

Differs from the paper: no QJL residual, and no random signs before the Hadamard matrix, as in vLLM
since https://github.com/vllm-project/vllm/pull/40194; `signs` brings them back, those that its
first layer had, for all layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.parameters import check_count, check_flag, frozen
from pytest_kvguard.storage.base import Codec, Storage
from pytest_kvguard.storage.bits import pack, unpack
from pytest_kvguard.storage.constants import held
from pytest_kvguard.storage.rotation import rotated
from pytest_kvguard.storage.vllm_fp8 import ScaledFloat8

KEY_BITS, VALUE_BITS = (3, 4, 8), (3, 4)
SMALLEST_HEAD = 16  # below, key and value together fill no even number of bytes
SEED = 42  # of the signs


def turboquant(
    keys: int = 4, values: int = 4, correct: bool = True, signs: bool = False, skip: int = 2
) -> Storage:
    """Store ``keys`` in 3, 4 or 8 bits and ``values`` in 3 or 4."""
    for name, bits, known in (("keys", keys, KEY_BITS), ("values", values, VALUE_BITS)):
        if type(bits) is not int or bits not in known:
            raise InvalidArgument(f"{name} must be one of {known}, got {bits!r}")
    check_flag("correct", correct), check_flag("signs", signs)
    codec: Codec = ScaledFloat8(torch.float8_e4m3fn)
    if keys < 8:
        codec = Levels(keys, correct, signs)
    return Storage(
        keys=codec,
        values=Uniform(values),
        skip=check_count("skip", skip, least=0),
        params=frozen(keys=keys, values=values, correct=correct, signs=signs, skip=skip),
    )


def turboquant_k8v4(skip: int = 2) -> Storage:
    """Store keys as 8-bit floats and values in 4 bits."""
    return turboquant(keys=8, values=4, correct=False, skip=skip)


def turboquant_4bit_nc(skip: int = 2) -> Storage:
    """Store keys and values in 4 bits, norms corrected."""
    return turboquant(keys=4, values=4, skip=skip)


def turboquant_k3v4_nc(skip: int = 2) -> Storage:
    """Store keys in 3 bits and values in 4, norms corrected."""
    return turboquant(keys=3, values=4, skip=skip)


def turboquant_3bit_nc(skip: int = 2) -> Storage:
    """Store keys and values in 3 bits, norms corrected."""
    return turboquant(keys=3, values=3, skip=skip)


TURBOQUANT: dict[str, Callable[..., Storage]] = {
    "turboquant": turboquant,
    "turboquant_k8v4": turboquant_k8v4,
    "turboquant_4bit_nc": turboquant_4bit_nc,
    "turboquant_k3v4_nc": turboquant_k3v4_nc,
    "turboquant_3bit_nc": turboquant_3bit_nc,
}
"""TurboQuant and vLLM's presets of it, by name."""


@dataclass(frozen=True)
class Levels:
    """Stores x as its norm and the nearest levels of what is left of it, rotated."""

    bits: int  # 3 or 4
    correct: bool = True
    signs: bool = False
    span: int = 1

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D): packed codes and norms (..., n, 1) float16.

        Raises InvalidArgument for a head whose size is no power of two of at least 16.
        """
        size = tokens.shape[-1]
        if size < SMALLEST_HEAD or size & (size - 1):
            raise InvalidArgument(
                f"heads of {size} channels cannot be rotated: their size must be a power of two "
                f"of at least {SMALLEST_HEAD}; use keys=8, or a format that takes any head size, "
                f"such as int8"
            )
        x = tokens.float()
        norm = x.norm(dim=-1, keepdim=True)
        unit = rotated(x / (norm + 1e-8) * self._signs(x), size).contiguous()
        codes = torch.bucketize(unit, self._held("middles", x), right=True)
        return pack(codes.byte(), self.bits), norm.half()

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D)."""
        packed, norm = parts
        codes = unpack(packed, self.bits)
        level = self._held("levels", codes)[codes.int()]
        if self.correct:
            level = level / (level * level).sum(dim=-1, keepdim=True).add(1e-16).sqrt()
        unit = rotated(level, level.shape[-1]) * self._signs(level)
        return (unit * norm.float()).to(dtype)

    def _held(self, what: str, like: Tensor) -> Tensor:
        size = like.shape[-1]

        def make() -> Tensor:
            levels = lloyd_max(size, self.bits)
            return levels if what == "levels" else (levels[1:] + levels[:-1]) / 2

        return held((what, self.bits, size), like.device, make)

    def _signs(self, like: Tensor) -> Tensor | float:
        size = like.shape[-1]
        return held(("signs", size), like.device, lambda: signs(size)) if self.signs else 1.0


@dataclass(frozen=True)
class Uniform:
    """Stores x as round((x - zero) / scale), with zero = min and scale = (max - min) / most."""

    bits: int  # 3 or 4
    span: int = 1

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D): packed codes, scale and zero (..., n, 1) float16 each."""
        size, most = tokens.shape[-1], 2**self.bits - 1
        if size * self.bits % 8:
            raise InvalidArgument(
                f"heads of {size} channels do not fill whole bytes with {self.bits} bits each; "
                f"use values=4 or a format that takes any head size, such as int8"
            )
        x = tokens.float()
        low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
        scale = ((high - low) / most).clamp(min=1e-8)
        codes = ((x - low) / scale + 0.5).floor().clamp(0, most)
        return pack(codes.byte(), self.bits), scale.half(), low.half()

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D)."""
        packed, scale, low = parts
        return (unpack(packed, self.bits) * scale.float() + low.float()).to(dtype)


def signs(size: int) -> Tensor:
    """Draw -1 or 1 for each channel, always the same ones."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0


def lloyd_max(size: int, bits: int) -> Tensor:
    """Return the 2^bits levels of least squared error for N(0, 1 / size), ascending float32.

    As vLLM finds them: from an even grid of +-3.5 standard deviations, at most 200 times the means
    between the middles, by the trapezoidal rule of 200 panels, in tails that end at 10.5.
    """
    deviation = 1 / math.sqrt(size)
    count, end = 2**bits, 3.5 * deviation
    levels = -end + 2 * end * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tails = torch.tensor([-3 * end, 3 * end], dtype=torch.float64)
    panels = torch.linspace(0, 1, 201, dtype=torch.float64)
    for _ in range(200):
        edges = torch.cat([tails[:1], (levels[1:] + levels[:-1]) / 2, tails[1:]])
        x = edges[:-1, None] + (edges[1:] - edges[:-1])[:, None] * panels
        density = torch.exp(-x * x * size / 2)
        means = torch.trapezoid(x * density, x) / torch.trapezoid(density, x)
        if (means - levels).abs().max() < 1e-10:
            break
        levels = means
    return levels.float()
