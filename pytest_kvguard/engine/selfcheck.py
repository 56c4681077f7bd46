"""Before a model is measured: does it say through our attention what it says by itself?

Models differ in ways no list of names can foresee: layers that attend twice, masks of their own,
states kept elsewhere. One short comparison covers them all.
"""

from collections.abc import Sequence

import torch

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.cache.base import Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.group import Group
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.engine.select import keep_all
from pytest_kvguard.errors import Unsupported

LENGTH = 24  # tokens compared; the first half is prefilled, the rest is fed
TOLERANCE = {torch.float32: 1e-3}  # of the logits' size; rounding of narrower types is coarser
COARSE = 0.1


def check_faithful(hook: AttentionHook, prompt: Sequence[int]) -> int:
    """Compare the logits of a prompt's first tokens with the untouched model's.

    Call it while the hook is closed. Returns the bytes of one position's keys and values. Raises
    Unsupported where the logits differ by more than rounding.
    """
    ids = tuple(prompt[:LENGTH])
    half = (len(ids) + 1) // 2
    with torch.inference_mode():
        tokens = torch.tensor([ids], device=hook.device)
        own = hook.model(input_ids=tokens, use_cache=False).logits[0, half:].float()
    with hook.uncounted(), hook.open():
        [held] = prefill(hook, [Wanted(ids[:half])], Observe())
        size = held.stack.position_bytes
        if half == len(ids):
            return size
        fed = len(ids) - half
        group = Group.of(Rows([keep_all(held, half)]), DenseCache, capacity=fed)
        ours = Batch(hook, [group], [half]).feed([ids[half:]], last=fed)[0]
    off = float((ours.float() - own).norm() / own.norm().clamp(min=1e-6))
    if off > TOLERANCE.get(hook.model.dtype, COARSE):
        raise Unsupported(
            f"{type(hook.model).__name__} answers differently when its attention is observed "
            f"(logits off by {off:.1%}), so its cache cannot be compressed faithfully; "
            f"use another model"
        )
    return size
