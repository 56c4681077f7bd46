"""What the end of the prompt attends to."""

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies.base import LayerState
from pytest_kvguard.policies.logits import capped, softmax


def window_attention(state: LayerState, window: int) -> Tensor:
    """Return the attention of the last ``window`` queries, by key/value head.

    Returns (Hkv, G, W, T) float32 with W = min(window, T); causal, rows sum to 1, or to less where
    the model has attention sinks. What an earlier layer dropped gets nothing, but that its own
    query sees itself.
    Raises InvalidArgument when fewer queries were recorded.
    """
    width = min(window, state.length)
    recorded = state.queries.shape[-2]
    if recorded < width:
        raise InvalidArgument(
            f"a window of {width} needs as many queries, but {recorded} were recorded; "
            f"set the policy's `window` to {width}"
        )
    heads, length, size = state.keys.shape
    queries = state.queries[:, -width:].reshape(heads, -1, width, size)  # (Hkv, G, W, D)
    logits = torch.einsum("hgwd,htd->hgwt", queries.float(), state.keys.float()) * state.scaling
    logits = capped(logits, state.softcap)
    positions = torch.arange(length, device=logits.device)
    asking = positions[-width:, None]
    hidden = positions > asking  # (W, T)
    if state.alive is not None:
        hidden = hidden | (~state.alive & (positions != asking))
    return softmax(logits.masked_fill(hidden, float("-inf")), state.sinks)


def summed_attention(state: LayerState) -> Tensor:
    """Return what each position got from all queries of the prompt, by query head of its group.

    Returns (Hkv, G, T) float32. Raises InvalidArgument when the sums were not recorded.
    """
    if state.attention_sums is None:
        raise InvalidArgument(
            "the attention sums were not recorded; set the policy's `needs_sums` to True"
        )
    return state.attention_sums.float().reshape(state.keys.shape[0], -1, state.length)
