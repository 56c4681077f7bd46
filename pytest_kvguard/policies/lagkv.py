"""LagKV: keep what stands out against the run of positions that follows.

Liang et al., 2025, https://arxiv.org/abs/2504.04704

importance  behind the first `sinks` positions, runs of `lag`; keys and values of a run, each
            channel scaled to the least and greatest of the next run, spread over the channels by
            some standard deviation: its softmax over the run, of keys and values together, ranks
            the positions of each run among themselves
budget      given; the same for every layer
selection   the top positions of each key/value head: the sinks, the end that no full run follows,
            then equally many of every run

Differs from the paper: the share kept of each run follows from the keep ratio of the whole
prompt, so that exactly the budget is kept; with less room than the sinks and the end, the latest
stay, and so they do of a prompt too short for two runs, which the paper leaves whole; a channel
that is constant in the next run counts for nothing; runs are not compressed again while decoding.
"""

import torch
from torch import Tensor

from pytest_kvguard.parameters import check_count, frozen
from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.recency import favour_latest
from pytest_kvguard.policies.selectors import top_tokens


def lagkv(sinks: int = 16, lag: int = 128) -> Policy:
    """Keep ``sinks`` first positions, and of runs of ``lag`` what the next run is least like."""
    check_count("sinks", sinks, least=0)
    check_count("lag", lag, least=2)

    def importance(state: LayerState) -> Tensor:
        runs = max(0, (state.length - sinks) // lag)
        end = max(0, state.length - sinks - lag * max(0, runs - 1))  # without a run to compare to
        rated = torch.zeros_like(state.keys[..., 0], dtype=torch.float32)  # (Hkv, T)
        if runs > 1:
            keys, values = (
                held[:, sinks : sinks + runs * lag].float().unflatten(1, (runs, lag))
                for held in (state.keys, state.values)
            )
            rated[:, sinks : state.length - end] = _ranks(_spread(keys) + _spread(values))
        lifted = favour_latest(rated, end)
        lifted[:, :sinks] = float("inf")
        return lifted

    return Policy("lagkv", importance, keep_ratio, top_tokens, params=frozen(sinks=sinks, lag=lag))


def _spread(held: Tensor) -> Tensor:
    """Rate each position of a run against the next run: (Hkv, P, L, D) -> (Hkv, P - 1, L)."""
    runs, following = held[:, :-1], held[:, 1:]
    least, greatest = following.amin(dim=2, keepdim=True), following.amax(dim=2, keepdim=True)
    width = greatest - least
    scaled = torch.where(width > 0, (runs - least) / width, 0.0)
    return scaled.std(dim=-1).softmax(dim=-1)


def _ranks(rated: Tensor) -> Tensor:
    """Count from the worst of each run up, of equals the later first; runs joined again."""
    best_first = rated.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(rated.shape[-1], 0, -1, device=rated.device).expand_as(rated)
    return torch.zeros_like(rated).scatter(-1, best_first, ranks.float()).flatten(1)
