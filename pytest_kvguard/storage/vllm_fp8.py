"""vLLM fp8: store every key and value as an 8-bit float, with one scale for all of a tensor.

`--kv-cache-dtype fp8_e4m3` (or `fp8`) and `fp8_e5m2`,
https://docs.vllm.ai/en/latest/features/quantization/quantized_kvcache/;
what is stored of x is the nearest 8-bit float to x / scale, the largest there is where that is
beyond it, csrc/quantization/w8a8/fp8/nvidia/quant_utils.cuh.

Differs from vLLM: a calibrated checkpoint has a scale for each layer, or for each head of each
layer; here `k_scale` and `v_scale` hold for all of them. vLLM takes no scales of a checkpoint for
E5M2. Some of its attention kernels round queries to 8 bits as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kvguard.parameters import check_positive, frozen
from pytest_kvguard.storage.base import Storage


def fp8_e4m3(k_scale: float = 1.0, v_scale: float = 1.0) -> Storage:
    """Store keys and values in 4 bits of exponent and 3 of mantissa, up to 448 x scale."""
    return _scaled(torch.float8_e4m3fn, k_scale, v_scale)


def fp8_e5m2(k_scale: float = 1.0, v_scale: float = 1.0) -> Storage:
    """Store keys and values in 5 bits of exponent and 2 of mantissa, up to 57344 x scale."""
    return _scaled(torch.float8_e5m2, k_scale, v_scale)


def _scaled(kind: torch.dtype, k_scale: float, v_scale: float) -> Storage:
    k_scale, v_scale = check_positive("k_scale", k_scale), check_positive("v_scale", v_scale)
    return Storage(
        keys=ScaledFloat8(kind, k_scale),
        values=ScaledFloat8(kind, v_scale),
        params=frozen(k_scale=k_scale, v_scale=v_scale),
    )


@dataclass(frozen=True)
class ScaledFloat8:
    """Stores x as the nearest 8-bit float to x / scale, saturated; the scale is given."""

    kind: torch.dtype
    scale: float = 1.0
    span: int = 1

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D) as codes (..., n, D), their bytes."""
        most = torch.finfo(self.kind).max
        codes = (tokens.float() / self.scale).clamp(-most, most).to(self.kind)
        return (codes.view(torch.uint8),)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D)."""
        return (parts[0].view(self.kind).float() * self.scale).to(dtype)
