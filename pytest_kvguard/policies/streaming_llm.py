"""StreamingLLM: keep the first few positions and the most recent ones.

Xiao et al., 2023, https://arxiv.org/abs/2309.17453

importance  the position itself; the first `sinks` positions come before all others
budget      given; the same for every layer
selection   the top positions of each key/value head; a new token takes the place of the oldest
            one that is no sink

Differs from the paper: keys keep the positions they had in the text unless
``positions="cache"``; the prompt is read with full attention and compressed once, not while it
is read. With too little room for the sinks and two more, the newest tokens displace sinks.
"""

import torch
from torch import Tensor

from pytest_kvguard.parameters import check_choice, check_count, frozen
from pytest_kvguard.policies.base import DecodeEviction, DecodeState, LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.evict import rolling_room, rolling_slots, room_for_next
from pytest_kvguard.policies.selectors import top_tokens


def streaming_llm(sinks: int = 4, positions: str = "original") -> Policy:
    """Keep the first ``sinks`` positions and the most recent ones.

    ``positions``: where attention sees a kept key, at its place in the text (``"original"``) or
    at its index in the cache (``"cache"``).
    """
    check_count("sinks", sinks, least=0)
    check_choice("positions", positions, ("original", "cache"))

    def importance(state: LayerState) -> Tensor:
        recency = torch.arange(state.length, dtype=torch.float32, device=state.keys.device)
        recency[:sinks] = float("inf")
        return recency.expand(state.keys.shape[0], -1)

    def candidates(state: DecodeState) -> Tensor:
        spared = (rolling_room(state) - 2).clamp(max=sinks)  # the newest and the next need two
        return state.positions >= spared.unsqueeze(-1)

    return Policy(
        "streaming_llm",
        importance,
        keep_ratio,
        top_tokens,
        params=frozen(sinks=sinks, positions=positions),
        rerotate=positions == "cache",
        decode=DecodeEviction(
            importance=lambda state: state.positions.float(),
            candidates=candidates,
            allowed=lambda state: room_for_next(candidates(state), state),
            slots=rolling_slots,
        ),
    )
