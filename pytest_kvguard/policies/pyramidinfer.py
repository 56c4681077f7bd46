"""PyramidInfer: each layer drops tokens, and the layers behind it never see them.

Yang et al., 2024, https://arxiv.org/abs/2405.12532

importance  attention paid by the queries of the last `recent` share of the prompt, averaged over
            all heads and over the queries, later ones weighing up to `distance` times as much
budget      falling from layer to layer, each a cosine-shaped share of what the one before left
selection   the latest positions, then the first `sinks`, then the top ones; one set for all
            heads of a layer, out of the set of the layer before

Differs from the paper: the keep ratio is the mean over layers, and sets how the cosine ends and,
below what that can reach, where it starts; the latest positions, there a fifth of the prompt in
every layer, take half of what a layer keeps at the most, so that low ratios hold others too; only
those of them that earlier layers kept have queries that vote; nothing is evicted while decoding;
what is dropped is hidden from later layers, which answers as if it were gone and saves memory but
no time. `pyramidinfer_kv` takes the same budgets and votes to a prefill that drops nothing, as
SCOPE's code does, https://arxiv.org/abs/2412.13649, so that only its cache is a pyramid.
"""

from math import inf
from numbers import Real

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.parameters import check_count, check_share, frozen
from pytest_kvguard.policies.base import ALL_QUERIES, LayerState, Policy
from pytest_kvguard.policies.budgets import narrowing, share
from pytest_kvguard.policies.observe import window_attention
from pytest_kvguard.policies.selectors import top_tokens


def pyramidinfer(recent: float = 0.2, sinks: int = 4, distance: float = 1.2) -> Policy:
    """Drop tokens between layers, during a prefill of its own for each keep ratio."""
    return _policy("pyramidinfer", recent, sinks, distance, narrows=True)


def pyramidinfer_kv(recent: float = 0.2, sinks: int = 4, distance: float = 1.2) -> Policy:
    """Drop positions from the cache alone, after the prefill that all policies share."""
    return _policy("pyramidinfer_kv", recent, sinks, distance, narrows=False)


def _policy(name: str, recent: float, sinks: int, distance: float, *, narrows: bool) -> Policy:
    check_share("recent", recent)
    check_count("sinks", sinks, least=0)
    if not isinstance(distance, Real) or isinstance(distance, bool) or not 0 < distance < inf:
        raise InvalidArgument(f"distance must be a finite number above 0, got {distance!r}")

    def importance(state: LayerState) -> Tensor:
        votes = _votes(state, recent, distance)  # (T,)
        votes[:sinks] = votes.max() + 1
        if state.alive is not None:
            votes[~state.alive] = float("-inf")
        return votes.expand(state.keys.shape[0], -1)

    def select(importance: Tensor, n: int, state: LayerState) -> Tensor:
        alive = _alive(state)
        latest = alive.nonzero().flatten()[-max(1, min(share(state.length, recent), n // 2)) :]
        lifted = importance.clone()
        # an empty slice, not an index: a part that `fair` chooses in may be all gone
        lifted[:, latest] = importance.amax() + 1 + (latest - latest[:1])
        return top_tokens(lifted, n, state) & alive

    return Policy(
        name,
        importance,
        narrowing(recent),
        select,
        params=frozen(recent=recent, sinks=sinks, distance=distance),
        window=ALL_QUERIES,
        narrows=narrows,
    )


def _alive(state: LayerState) -> Tensor:
    return torch.ones_like(state.protected) if state.alive is None else state.alive


def _votes(state: LayerState, recent: float, distance: float) -> Tensor:
    """Average the attention of the queries that are recent and alive, (T,) float32."""
    alive = _alive(state).nonzero().flatten()
    start = min(state.length - share(state.length, recent), int(alive[-1]))  # one votes at least
    attention = window_attention(state, state.length - start).mean(dim=(0, 1))  # (W, T)
    paid = attention[alive[alive >= start] - start]
    weight = torch.linspace(1, distance, len(paid), device=paid.device)
    return (weight[:, None] * paid).mean(dim=0)
