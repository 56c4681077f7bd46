"""Rows that write on from one prefill, side by side, each seeing what it kept of it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pytest_kvguard.kv.attention import attend_beside, visible
from pytest_kvguard.kv.compress import KeptLayer
from pytest_kvguard.kv.rows import GrowingLayer
from pytest_kvguard.kv.seam import Step


class SharingLayer:
    """One layer of R rows of one prefill: that is not copied, only what is new is held apart."""

    rewindable = True

    def __init__(self, kept: Sequence[KeptLayer], room: int) -> None:
        """kept: all of one source, in a layer without a window; room: slots for what is new."""
        source = kept[0].source
        self.shared = source.keys, source.values  # (Hkv, T, D)
        heads, length = source.keys.shape[:2]
        self.hidden = source.keys.new_full((heads, len(kept), length), float("-inf"))
        for row, layer in enumerate(kept):
            self.hidden[:, row].scatter_(1, layer.places, 0.0)
        self.own = GrowingLayer([nothing(layer) for layer in kept], room)
        self.started = torch.tensor([layer.bytes for layer in kept], device=self.hidden.device)

    def attend(self, step: Step, asking: Tensor, writing: Tensor) -> Tensor:
        """Append the new tokens and attend to them and to what each row keeps."""
        self.append(step.key, step.value, writing)
        keys, values, positions = self.own.filled
        mask = visible(positions, asking[:, None])
        own = keys, values
        return attend_beside(step.query, self.shared, self.hidden, own, mask, step.scaling)

    def append(self, keys: Tensor, values: Tensor, writing: Tensor) -> None:
        """Hold more tokens, (R, Hkv, Q, D), at positions (R, Q)."""
        self.own.append(keys, values, writing)

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.own.take(rows)
        self.hidden, self.started = self.hidden[:, rows], self.started[rows]

    def forget(self, first: Tensor) -> None:
        """Empty the slots of each row from position ``first`` (R,) on."""
        self.own.forget(first)

    def join(self, others: Sequence["SharingLayer"]) -> None:
        """Rows of different prefills share nothing."""
        raise AssertionError("rows that share a prefill are made together")

    def owned(self, room: int) -> "SharingLayer":
        """The layer itself: as long as the prefill is there, nothing need be copied."""
        return self

    @property
    def freed(self) -> Tensor:
        """Slots that were emptied while decoding: none, (R,)."""
        return self.own.freed

    @property
    def bytes(self) -> Tensor:
        """Bytes of what each row would hold if it were alone, (R,)."""
        return self.started + self.own.bytes


def shareable(keys: Tensor) -> bool:
    """Whether attention may be a plain product: logits must not be rounded to half precision."""
    return keys.dtype == torch.float32


def worth_sharing(kept: Sequence[KeptLayer]) -> tuple[list[list[int]], list[int]]:
    """Tell which rows share a prefill and had more to copy of it than there is; and the others.

    To share it costs a look at all of it for each token, but for all rows together.
    """
    rows: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    alone: list[int] = []
    for row, layer in enumerate(kept):
        keys = layer.source.keys
        if layer.window is None and shareable(keys):
            rows[keys.data_ptr(), keys.shape[1]].append(row)
        else:
            alone.append(row)
    sharing = []
    for (_, length), same in rows.items():
        if sum(kept[row].positions.shape[1] for row in same) >= length:
            sharing.append(same)
        else:
            alone += same
    return sharing, alone


def nothing(kept: KeptLayer) -> KeptLayer:
    """Return a layer that keeps nothing of the same source."""
    none = kept.positions[:, :0]
    return replace(kept, index=none, positions=none)
