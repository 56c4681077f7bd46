"""Observed attention: keep what the queries that could see it attended to on average.

kvpress, ObservedAttentionPress, https://github.com/NVIDIA/kvpress; related to H2O, Zhang et al.,
2023, https://arxiv.org/abs/2306.14048

importance  attention received, divided by the number of queries at or after the position
budget      given; the same for every layer
selection   the top positions of each key/value head

Differs from the paper: from H2O, in that it averages instead of adding up, so that early
positions have no advantage, keeps no recent window, and ends with the prompt.
"""

import torch
from torch import Tensor

from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.observe import summed_attention
from pytest_kvguard.policies.selectors import top_tokens


def observed_attention() -> Policy:
    """Keep what the queries that could see it attended to on average."""
    return Policy("observed_attention", _importance, keep_ratio, top_tokens, needs_sums=True)


def _importance(state: LayerState) -> Tensor:
    queries = torch.arange(state.length, 0, -1, device=state.keys.device)  # that see each key
    return summed_attention(state).mean(dim=1) / queries
