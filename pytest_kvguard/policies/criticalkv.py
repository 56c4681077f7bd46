"""CriticalKV: keep what is attended to, and of the rest what would change the output most.

Feng et al., 2025, https://arxiv.org/abs/2502.03805

importance  SnapKV's smoothed attention, averaged over queries, times the L1 norm of what the
            output projection makes of the value, averaged over the query heads that share it
budget      given; the same for every layer
selection   first a `first` share of the budget by attention alone, then the top positions by
            importance, for each key/value head; the window stays before any other

Differs from the paper: query heads that share a key/value head are averaged; as in the published
code, EPSILON is added to attention before it is multiplied.
"""

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.parameters import check_share, frozen
from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio, share
from pytest_kvguard.policies.recency import favour_latest
from pytest_kvguard.policies.selectors import protected_of, top_after, top_tokens
from pytest_kvguard.policies.snapkv import window_votes

EPSILON = 1e-4
"""Attention that every position is given, so that large values are not lost for want of any."""


def criticalkv(window: int = 32, kernel: int = 5, first: float = 0.5) -> Policy:
    """Keep a ``first`` share by SnapKV's attention, the rest by its effect on the output."""
    votes = window_votes(window, kernel, "avg")
    check_share("first", first)

    def importance(state: LayerState) -> Tensor:
        queries = min(window, state.length) * (state.queries.shape[0] // state.keys.shape[0])
        rated = (state.once(votes) / queries + EPSILON) * projected_norms(state)
        return favour_latest(rated, window)

    def select(importance: Tensor, n: int, state: LayerState) -> Tensor:
        attended = favour_latest(state.once(votes), window)
        sure = top_tokens(attended, share(n, first), state) | protected_of(importance, state)
        return top_after(sure, importance, n)

    return Policy(
        "criticalkv",
        importance,
        keep_ratio,
        select,
        params=frozen(window=window, kernel=kernel, first=first),
        window=window,
    )


def projected_norms(state: LayerState) -> Tensor:
    """Return the L1 norm each value has behind the output projection, (Hkv, T) float32.

    Averaged over the query heads that share the value. Raises InvalidArgument for a model whose
    output projection is not known.
    """
    if state.output is None:
        raise InvalidArgument(
            "criticalkv weighs values by the model's output projection, which this model does "
            "not show; use a policy that looks at values alone, such as vatp"
        )
    values = state.values.float()
    heads, group = len(values), len(state.output) // len(values)
    norms = [  # head by head: (T, M) at a time
        (values[head // group] @ projection.float()).abs().sum(dim=-1)
        for head, projection in enumerate(state.output)
    ]
    return torch.stack(norms).unflatten(0, (heads, group)).mean(dim=1)
