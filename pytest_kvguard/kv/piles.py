"""What rows keep, put side by side in tensors with a slot for each position."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from pytest_kvguard.kv.compress import KeptLayer


def side_by_side(kept: Sequence[KeptLayer], slots: int) -> tuple[Tensor, Tensor]:
    """Copy what rows keep of a layer: keys and values, (R, Hkv, slots, D) each.

    Slots beyond what a row keeps hold numbers that mean nothing: attention must not see them.
    """
    places = stack([layer.places for layer in kept], slots)  # (R, Hkv, slots)
    keys = [layer.source.keys for layer in kept]
    return _gathered(keys, places), _gathered([layer.source.values for layer in kept], places)


def _gathered(sources: Sequence[Tensor], places: Tensor) -> Tensor:
    """Take from each row's source (Hkv, T, D) what is at its places (R, Hkv, n)."""
    size = sources[0].shape[-1]
    out = sources[0].new_empty(*places.shape, size)
    done = 0
    for _, group in groupby(sources, key=_where):
        same = list(group)
        rows = slice(done, done := done + len(same))
        heads, length = same[0].shape[:2]
        if length == 0:
            out[rows] = 0.0
            continue
        flat = places[rows] + length * torch.arange(heads, device=places.device).unsqueeze(-1)
        vectors = same[0].reshape(-1, size)
        # Whole vectors at a time: several times as fast as `gather`, which goes number by number.
        torch.index_select(vectors, 0, flat.flatten(), out=out[rows].view(-1, size))
    return out


def _where(source: Tensor) -> tuple[object, ...]:
    """Tell sources apart: rows of one prefill, whoever made them, share theirs."""
    return source.data_ptr(), source.shape, source.stride()


def stack(parts: Sequence[Tensor], slots: int, empty: int = 0) -> Tensor:
    """Stack (Hkv, n, ...) into (R, Hkv, slots, ...); what is not filled holds ``empty``."""
    return pile([part.unsqueeze(0) for part in parts], slots, empty)


def pile(parts: Sequence[Tensor], slots: int, empty: int = 0) -> Tensor:
    """Put rows (r, Hkv, n, ...) behind one another, into (R, Hkv, slots, ...).

    What is not filled holds ``empty``, for it must hold numbers: attention weight 0 times nan
    would be nan.
    """
    first = parts[0]
    rows = sum(len(part) for part in parts)
    out = first.new_empty(rows, first.shape[1], slots, *first.shape[3:])
    for own, part in zip(out.split([len(part) for part in parts]), parts, strict=True):
        own[:, :, : part.shape[2]] = part
        own[:, :, part.shape[2] :] = empty
    return out
