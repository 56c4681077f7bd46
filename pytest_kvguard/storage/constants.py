"""Constants that codecs look up, held on each device.

A step of decoding is captured as a CUDA graph, and nothing may be copied to a device while that
goes on. A cache encodes its prompt before, so by then what its codec looks up lies here.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_HELD: dict[tuple[Hashable, torch.device], Tensor] = {}


def held(name: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """Return what ``make`` returns, on a device; made once for each name."""
    if (name, device) not in _HELD:
        _HELD[name, device] = make().to(device)
    return _HELD[name, device]


def table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers as a float32 vector on a device."""
    return held(values, device, lambda: torch.tensor(values))
