"""Turn rotated keys to other positions.

Su et al., 2021, https://arxiv.org/abs/2104.09864: a rotary embedding turns pairs of channels by
an angle proportional to the position, so a key rotated for p becomes one for p + d by d more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kvguard.errors import Unsupported
from pytest_kvguard.kv.seam import Seam, Step

FIXED_KINDS = {"default", "linear", "llama3"}
"""Rotary scalings whose frequencies do not depend on the length of the prompt."""


@dataclass(frozen=True)
class Rotation:
    """The rotary frequencies of a model."""

    frequencies: Tensor  # (pairs,); 2 * pairs channels are rotated, the rest left as they are

    def turn(self, keys: Tensor, by: Tensor) -> Tensor:
        """Turn each key by a number of positions. keys: (..., n, D), by: (..., n)."""
        width = 2 * len(self.frequencies)
        angle = by.unsqueeze(-1).float() * self.frequencies  # (..., n, pairs)
        cos, sin = angle.cos(), angle.sin()
        first, second = keys[..., :width].float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([turned.to(keys.dtype), keys[..., width:]], dim=-1)


def find_rotation(seam: Seam) -> Rotation:
    """Read the rotary frequencies off a model and check them against its own keys.

    Raises Unsupported for a model with none, with several, or that pairs channels differently.
    """
    name = type(seam.model).__name__
    found = [b for n, b in seam.model.named_buffers() if n.rsplit(".", 1)[-1] == "inv_freq"]
    rope = getattr(seam.model.config.get_text_config(), "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if len(found) != 1 or kind not in FIXED_KINDS:
        raise Unsupported(
            f"{name} has {len(found)} sets of rotary frequencies of type {kind!r}; keys can be "
            f"moved to cache positions only with one set of type {', '.join(sorted(FIXED_KINDS))}"
        )
    rotation = Rotation(found[0].to(seam.device))
    _check(seam, rotation)
    return rotation


def _check(seam: Seam, rotation: Rotation) -> None:
    """Feed one token twice: the first layer's keys may differ by the rotation only."""
    seen: dict[int, Tensor] = {}

    def record(step: Step) -> Tensor:
        seen[step.layer] = step.key
        return step.query

    ids = torch.ones(1, 2, dtype=torch.long, device=seam.device)
    seam.forward(ids, torch.tensor([[0, 9]], device=seam.device), record, last=1)
    first, second = seen[min(seen)][0].unbind(dim=1)  # (Hkv, D) each
    turned = rotation.turn(first, torch.full(first.shape[:1], 9, device=first.device))
    if not torch.allclose(turned.float(), second.float(), rtol=1e-2, atol=1e-2):
        raise Unsupported(
            f"{type(seam.model).__name__} rotates its keys in a way that cannot be undone here; "
            f"use the policy with original positions"
        )
