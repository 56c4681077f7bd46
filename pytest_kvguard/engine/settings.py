"""What the engine decides by size: each threshold has a name, and tests shrink it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Settings:
    """Sizes at which the engine does one thing rather than another; answers do not depend on them.

    The defaults are for a CPU.
    """

    prefill_tokens: int = 256  # of one pass of prefill, padding included
    capacity: int = 64  # slots for new tokens at first
    growth: int = 64  # slots that are added when there is no room for new tokens
    alike: float = 0.9  # rows are padded to the longest where the shortest is this share of it
    worth_keeping: float = 0.8  # rows at their end are carried along while these are going
    look_every: int = 1  # steps between two looks at what was written
    worth_capturing: int = 8  # steps to come for which a captured graph pays
    rehearsals: int = 2  # steps that run before one is captured: libraries set themselves up

    @classmethod
    def on(cls, device: torch.device) -> "Settings":
        """Return what suits a device: a GPU wants few shapes, large passes and few questions."""
        if device.type != "cuda":
            return cls()
        return cls(prefill_tokens=16384, capacity=1024, growth=1024, alike=0.5, look_every=8)
