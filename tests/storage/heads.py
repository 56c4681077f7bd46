"""Tokens of a few heads, always the same ones."""

import torch
from torch import Tensor


def heads(tokens: int = 24, size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (2, 3, tokens, size) normal numbers."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, 3, tokens, size, generator=generator).to(dtype)
