"""RoPE: rotate keys that were rotated for one position to another.

Su et al., 2021, https://arxiv.org/abs/2104.09864: a rotary embedding turns pairs of channels by
an angle proportional to the position, so a key rotated for p becomes one for p + d by d more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FIXED_KINDS = {"default", "linear", "llama3"}
"""Rotary scalings whose frequencies do not depend on the length of the prompt."""


@dataclass(frozen=True)
class Rotation:
    """The rotary frequencies of a model."""

    frequencies: Tensor  # (pairs,); 2 * pairs channels are rotated, the rest left as they are

    def turn(self, keys: Tensor, by: Tensor) -> Tensor:
        """Turn each key by a number of positions. keys: (..., n, D), by: (..., n)."""
        width = 2 * len(self.frequencies)
        frequencies = self.frequencies.to(keys.device)  # a layer may lie on another one
        angle = by.unsqueeze(-1).float() * frequencies  # (..., n, pairs)
        cos, sin = angle.cos(), angle.sin()
        first, second = keys[..., :width].float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([turned.to(keys.dtype), keys[..., width:]], dim=-1)
