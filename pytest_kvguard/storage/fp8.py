"""fp8: store every key and value as an 8-bit float (E4M3), with a scale a token and head.

Micikevicius et al., 2022, FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433

Differs from vLLM's `fp8`, which is `fp8_e4m3` here: its scale is one number a tensor, 1 unless
calibrated. Here the largest channel of each token and head becomes the largest number there is, as
under vLLM's `fp8_per_token_head`, whose scales take 4 bytes; here they are of the model's type.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kvguard.storage.base import Storage

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def fp8() -> Storage:
    """Store keys and values as 8-bit floats (E4M3) as they are written."""
    return Storage(keys=Float8(), values=Float8())


@dataclass(frozen=True)
class Float8:
    """Stores x as the nearest 8-bit float to x / scale, with scale = max |x| / 448."""

    span: int = 1

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D) as codes (..., n, D), their bytes, and scales (..., n, 1)."""
        scale = (tokens.float().abs().amax(dim=-1, keepdim=True) / LARGEST).to(tokens.dtype)
        step = torch.where(scale > 0, scale, 1.0).float()
        codes = (tokens.float() / step).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8), scale

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D)."""
        codes, scale = parts
        return (codes.view(torch.float8_e4m3fn).float() * scale.float()).to(dtype)
