"""Before a model is measured: does it say through our attention what it says by itself?

Models differ in ways no list of names can foresee: layers that attend twice, masks of their own,
states kept elsewhere. One short comparison covers them all.
"""

from collections.abc import Sequence

import torch

from pytest_kvguard.errors import Unsupported
from pytest_kvguard.kv.compress import keep_all
from pytest_kvguard.kv.prefill import Observe, prefill
from pytest_kvguard.kv.rows import Rows
from pytest_kvguard.kv.seam import Seam

LENGTH = 24  # tokens compared; the first half is prefilled, the rest is fed
TOLERANCE = {torch.float32: 1e-3}  # of the logits' size; rounding of narrower types is coarser
COARSE = 0.1


def check_faithful(seam: Seam, prompt: Sequence[int]) -> None:
    """Compare the logits of a prompt's first tokens with the untouched model's.

    Call it while the seam is closed. Raises Unsupported where they differ by more than rounding.
    """
    ids = list(prompt[:LENGTH])
    half = (len(ids) + 1) // 2
    with torch.inference_mode():
        tokens = torch.tensor([ids], device=seam.device)
        own = seam.model(input_ids=tokens, use_cache=False).logits[0, half:].float()
    counted = seam.forwards, seam.tokens
    with seam.open():
        held = prefill(seam, ids[:half], Observe())
        if half == len(ids):
            return
        ours = Rows([keep_all(held, half)]).feed(seam, [ids[half:]], last=len(ids) - half)[0]
    seam.forwards, seam.tokens = counted  # this was no part of any measurement
    off = float((ours.float() - own).norm() / own.norm().clamp(min=1e-6))
    if off > TOLERANCE.get(seam.model.dtype, COARSE):
        raise Unsupported(
            f"{type(seam.model).__name__} answers differently when its attention is observed "
            f"(logits off by {off:.1%}), so its cache cannot be compressed faithfully; "
            f"use another model"
        )
