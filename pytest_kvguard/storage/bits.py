"""Codes of a few bits, packed into bytes."""

import math

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of ``bits`` bits: (..., n) uint8 -> (..., n * bits / 8) uint8, first lowest."""
    count, width, kind = _word(bits)
    words = codes.unflatten(-1, (codes.shape[-1] // count, count)).to(kind)
    words = (words << _places(count, bits, words)).sum(dim=-1, dtype=kind)
    if width == 1:
        return words
    return ((words.unsqueeze(-1) >> _places(width, 8, words)) & 255).byte().flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack`."""
    count, width, kind = _word(bits)
    words = packed
    if width > 1:
        each = packed.unflatten(-1, (packed.shape[-1] // width, width)).to(kind)
        words = (each << _places(width, 8, each)).sum(dim=-1, dtype=kind)
    codes = (words.unsqueeze(-1) >> _places(count, bits, words)) & (2**bits - 1)
    return codes.byte().flatten(-2)


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """Say how many codes fill how many whole bytes, and in which type these are put together."""
    whole = math.lcm(bits, 8)
    return whole // bits, whole // 8, torch.uint8 if whole == 8 else torch.int32


def _places(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * step, step, device=like.device, dtype=like.dtype)
