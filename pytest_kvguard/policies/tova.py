"""TOVA: keep what the newest query attends to.

Oren et al., 2024, https://arxiv.org/abs/2401.06104

importance  attention of the last query, averaged over all query heads of the layer
budget      given; the same for every layer
selection   the top positions, the same for every head; after each new token the position its
            query attends to least goes

Differs from the paper: the newest token itself cannot go before the next one has come.
"""

import torch
from torch import Tensor

from pytest_kvguard.policies.base import DecodeEviction, DecodeState, LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.evict import attention_of_all_heads, rolling_slots, room_for_next
from pytest_kvguard.policies.observe import window_attention
from pytest_kvguard.policies.selectors import top_tokens


def tova() -> Policy:
    """Keep what the newest query attends to, at the end of the prompt and at every step."""
    return Policy(
        "tova",
        _importance,
        keep_ratio,
        top_tokens,
        decode=DecodeEviction(
            importance=attention_of_all_heads,
            candidates=_anything,
            allowed=lambda state: room_for_next(_anything(state), state),
            slots=rolling_slots,
        ),
    )


def _importance(state: LayerState) -> Tensor:
    votes = window_attention(state, 1).mean(dim=(0, 1, 2))  # (T,)
    return votes.expand(state.keys.shape[0], -1)


def _anything(state: DecodeState) -> Tensor:
    return torch.ones_like(state.held)
