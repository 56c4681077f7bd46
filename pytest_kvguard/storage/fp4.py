"""Block floats: store keys and values as 4-bit floats (E2M1) with a scale a block of channels.

E2M1 has the numbers 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with either sign. Halves between two go to the
one whose last bit is 0, and what is beyond 6 to 6.

mxfp4      blocks of 32 whose scale is a power of two (E8M0): 2^(floor(log2 max |x|) - 2), as in the
           OCP Microscaling Formats (MX) Specification 1.0, 2023, section 6.3,
           https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
nvfp4      blocks of 16 whose scale is an 8-bit float (E4M3) of max |x| / 6 over a scale of the
           whole tensor, which is given, as vLLM's `--kv-cache-dtype nvfp4` and TensorRT-LLM do,
           https://developer.nvidia.com/blog/optimizing-inference-for-long-context-and-large-batch-sizes-with-nvfp4-kv-cache

Differs from engines: the scale of the whole tensor is given, the same for all layers, where a
calibrated checkpoint has one for each. It takes no bytes here: it is one number a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.parameters import check_positive, frozen
from pytest_kvguard.storage.base import Storage
from pytest_kvguard.storage.bits import pack, unpack

LARGEST = 6.0  # of E2M1
LARGEST_POWER = 2  # the exponent of 4 and 6
E8M0_BIAS = 127
E4M3 = torch.float8_e4m3fn


def mxfp4() -> Storage:
    """Store keys and values as 4-bit floats, with a power of two for each 32 channels."""
    return Storage(keys=MXFP4(), values=MXFP4())


def nvfp4(k_scale: float = 1.0, v_scale: float = 1.0) -> Storage:
    """Store keys and values as 4-bit floats, with an 8-bit float for each 16 channels."""
    k_scale, v_scale = check_positive("k_scale", k_scale), check_positive("v_scale", v_scale)
    return Storage(
        keys=NVFP4(k_scale), values=NVFP4(v_scale), params=frozen(k_scale=k_scale, v_scale=v_scale)
    )


@dataclass(frozen=True)
class MXFP4:
    """Stores x as the nearest 4-bit float to x / 2^e, e for each 32 channels."""

    span: int = 1

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D): codes (..., n, D / 2) and exponents (..., n, D / 32), all uint8."""
        x = blocks(tokens, 32)
        _, exponent = torch.frexp(x.abs().amax(dim=-1, keepdim=True))  # |x| in [0.5, 1) * 2^e
        power = (exponent - 1 - LARGEST_POWER).clamp(-E8M0_BIAS, E8M0_BIAS)
        codes = encode_e2m1(torch.ldexp(x, -power))
        return pack(codes.flatten(-2), 4), (power + E8M0_BIAS).squeeze(-1).byte()

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D)."""
        codes, power = parts
        x = blocks(decode_e2m1(unpack(codes, 4)), 32)
        return torch.ldexp(x, power.int().unsqueeze(-1) - E8M0_BIAS).flatten(-2).to(dtype)


@dataclass(frozen=True)
class NVFP4:
    """Stores x as the nearest 4-bit float to x / (s * scale), s an E4M3 for each 16 channels."""

    scale: float = 1.0
    span: int = 1

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D): codes (..., n, D / 2) and scales (..., n, D / 16), all uint8."""
        x = blocks(tokens, 16)
        most = x.abs().amax(dim=-1, keepdim=True) / LARGEST / self.scale
        step = most.clamp(max=torch.finfo(E4M3).max).to(E4M3)
        width = step.float() * self.scale
        codes = encode_e2m1(torch.where(width > 0, x / width, 0.0))
        return pack(codes.flatten(-2), 4), step.squeeze(-1).view(torch.uint8)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D)."""
        codes, step = parts
        width = step.view(E4M3).float().unsqueeze(-1) * self.scale
        return (blocks(decode_e2m1(unpack(codes, 4)), 16) * width).flatten(-2).to(dtype)


def encode_e2m1(x: Tensor) -> Tensor:
    """Round float32 to E2M1: the sign in the highest of four bits, (...) uint8."""
    size = x.abs().clamp(max=LARGEST)
    middle, high = size >= 2, size >= 4  # from 2 on the steps are 1, from 4 on they are 2
    step = torch.where(high, 2.0, torch.where(middle, 1.0, 0.5))
    codes = (size / step).round() + 2 * middle + 2 * high  # `round` takes halves to even
    return codes.byte() | x.signbit().byte() << 3


def decode_e2m1(codes: Tensor) -> Tensor:
    """Undo `encode_e2m1`, float32."""
    size = codes & 7
    exact = torch.where(size < 4, size * 0.5, torch.where(size < 6, size - 2.0, size * 2.0 - 8.0))
    return torch.where(codes > 7, -exact, exact)


def blocks(x: Tensor, width: int) -> Tensor:
    """Cut (..., D) into (..., D / width, width) float32; InvalidArgument where a rest is left."""
    size = x.shape[-1]
    if size % width:
        raise InvalidArgument(
            f"heads of {size} channels cannot be cut into blocks of {width}; "
            f"use a format that takes any head size, such as int8"
        )
    return x.float().unflatten(-1, (size // width, width))
