"""The contract of a layer's cache, and what its rows begin with."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.engine.attention import AttentionCall
from pytest_kvguard.engine.select import Kept, behind_window
from pytest_kvguard.engine.stack import StackLayer
from pytest_kvguard.policies.base import EMPTY

ALIGNED = 16
"""On an accelerator the number of slots is a multiple of this, as its kernels read biases."""


@dataclass
class Cursor:
    """The next free slot for new tokens: the same for all rows and layers of a group."""

    capacity: int  # slots for new tokens
    used: int = 0
    _slot: dict[torch.device, Tensor] = field(default_factory=dict)

    def slots(self, device: torch.device, width: int = 1) -> Tensor:
        """Return the slots of the next ``width`` tokens, (width,); a tensor read by graphs."""
        if device not in self._slot:
            self._slot[device] = torch.tensor([self.used], device=device)
        slot = self._slot[device]
        return slot if width == 1 else slot + torch.arange(width, device=device)

    def advance(self, width: int) -> None:
        """Go on behind the tokens that were written."""
        self.used += width
        self.step(width)

    def step(self, width: int = 1) -> None:
        """Move the tensors that graphs read; ``used`` is counted by who runs the graph."""
        for slot in self._slot.values():
            slot += width


class LayerCache(ABC):
    """One layer of R rows: writes new tokens, and attends to what each row holds."""

    keys: Tensor  # (R, Hkv, C, D)

    @property
    def device(self) -> torch.device:
        """Where the layer lies."""
        return self.keys.device

    @abstractmethod
    def attend(self, call: AttentionCall, asking: Tensor, real: Tensor | None) -> Tensor:
        """Write new tokens and attend: -> (R, Hq, Q, D).

        asking: (R, Q) the position each token looks from; real: (R, Q) False for padding, or None
        where there is none.
        """

    @abstractmethod
    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""

    @abstractmethod
    def grow(self, more: int) -> None:
        """Make room for ``more`` new tokens."""

    @property
    def freed(self) -> Tensor | None:
        """Slots that were emptied while decoding, over all heads, (R,); None: nothing goes."""
        return None

    @property
    def bytes(self) -> Tensor | None:
        """Bytes of what each row stores, (R,); None: what `Kept` says and what was fed."""
        return None

    @property
    def read(self) -> Tensor | None:
        """Share of what is held that each row read so far, (R,) float64; None: all of it."""
        return None


@dataclass(frozen=True)
class Rows:
    """What R rows of one wave of prompts begin with."""

    kept: Sequence[Kept]

    def __len__(self) -> int:
        return len(self.kept)

    @cached_property
    def positions(self) -> Tensor:
        """Positions that are kept, (R, layers, Hkv, n), EMPTY behind those with fewer."""
        most = max(kept.positions.shape[-1] for kept in self.kept)
        first = self.kept[0].positions
        out = first.new_full((len(self), *first.shape[:2], most), EMPTY)
        for row, kept in zip(out, self.kept, strict=True):
            row[..., : kept.positions.shape[-1]] = kept.positions
        return out

    @cached_property
    def slots(self) -> list[int]:
        """Where in the stack each row's prompt lies."""
        return [kept.prefill.slot for kept in self.kept]

    def most(self, layer: StackLayer, index: int) -> int:
        """Positions that the longest row's fullest head keeps of a layer."""
        if layer.window is not None:
            return max(kept.length - behind_window(layer, kept) for kept in self.kept)
        return max(kept.most(index) for kept in self.kept)

    def even(self, layer: StackLayer, index: int) -> bool:
        """Whether all heads of each row keep equally many, so that the same slots are empty."""
        if layer.window is not None:
            return True
        held = torch.stack([kept.held[index] for kept in self.kept])
        return bool((held == held[:, :1]).all())

    def places(self, layer: StackLayer, index: int) -> Tensor:
        """Positions that are kept of a layer, (R, Hkv, n) on its device; EMPTY behind fewer."""
        most, device = self.most(layer, index), layer.keys.device
        if layer.window is None:
            return self.positions[:, index, :, :most].to(device)
        first = torch.tensor([behind_window(layer, kept) for kept in self.kept], device=device)
        end = torch.tensor([kept.length for kept in self.kept], device=device)[:, None]
        at = first[:, None] + torch.arange(most, device=device)
        at = torch.where(at < end, at, EMPTY)
        return at[:, None].expand(-1, layer.keys.shape[1], -1)

    def copy(self, layer: StackLayer, index: int, slots: int) -> tuple[Tensor, Tensor]:
        """Gather what is kept of a layer, each from where it lies, keys and values.

        Returns (R, Hkv, slots, D) each; slots behind what a row keeps hold numbers that mean
        nothing: attention must not see them.
        """
        at = self.places(layer, index)
        at = F.pad(at, (0, slots - at.shape[-1])).clamp(min=0)
        _, heads, length, _ = layer.keys.shape
        slot = torch.tensor(self.slots, device=at.device)[:, None, None]
        head = torch.arange(heads, device=at.device)[:, None]
        flat = ((slot * heads + head) * length + at).flatten()
        # Whole vectors at a time: several times as fast as `gather`, which goes number by number.
        pair = tuple(
            held.flatten(0, 2).index_select(0, flat).unflatten(0, at.shape)
            for held in (layer.keys, layer.values)
        )
        if layer.window is None:
            for row, kept in enumerate(self.kept):
                if kept.own is not None:
                    for out, part in zip(pair, kept.own[index], strict=True):
                        out[row, :, : part.shape[1]] = part
        keys, values = pair
        return keys, values


def aligned(slots: int, device: torch.device) -> int:
    """Round a number of slots up to what kernels of this device like."""
    return -(-slots // ALIGNED) * ALIGNED if device.type == "cuda" else slots


def widened(tensor: Tensor, more: int, dim: int, value: float = 0) -> Tensor:
    """Add slots at the end of a dimension, counted from the back (-1, -2, ...)."""
    return F.pad(tensor, (0, 0) * (-dim - 1) + (0, more), value=value)
