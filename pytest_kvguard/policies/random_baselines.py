"""Random tokens and random shots: what a policy must beat to be worth its cost.

Random tokens: kvpress, RandomPress, https://github.com/NVIDIA/kvpress
Random shots: Liu et al., 2025 (KVFundaBench), https://arxiv.org/abs/2502.01941

importance  drawn anew for each layer: for each position of each head, or for each unit
budget      given; the same for every layer
selection   the top positions of each key/value head; or whole units, best first

Differs from the paper: which shots it drew, and whether layers shared them, is not said there.
The draw depends on the seed, the layer and the number of positions alone, never on the global
random state.
"""

import hashlib

import torch
from torch import Tensor

from pytest_kvguard.parameters import check_count, frozen
from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio, keep_ratio_of_units
from pytest_kvguard.policies.selectors import top_tokens, whole_units
from pytest_kvguard.policies.units import positions_of


def random_tokens(seed: int = 0) -> Policy:
    """Keep positions at random, other ones in each head and layer."""
    check_count("seed", seed, least=0)

    def importance(state: LayerState) -> Tensor:
        return _draw(seed, state, (state.keys.shape[0], state.length)).to(state.keys.device)

    return Policy("random_tokens", importance, keep_ratio, top_tokens, params=frozen(seed=seed))


def random_shots(seed: int = 0) -> Policy:
    """Keep whole units at random, other ones in each layer."""
    check_count("seed", seed, least=0)

    def importance(state: LayerState) -> Tensor:
        votes = torch.zeros(state.length)
        for unit, vote in zip(state.units, _draw(seed, state, (len(state.units),)), strict=True):
            votes[positions_of(unit)] = vote
        return votes.to(state.keys.device).expand(state.keys.shape[0], -1)

    return Policy(
        "random_shots",
        importance,
        keep_ratio_of_units,
        whole_units("skip"),
        params=frozen(seed=seed),
        keeps_units=True,
    )


def _draw(seed: int, state: LayerState, shape: tuple[int, ...]) -> Tensor:
    """Return float32 in [0, 1) on the CPU, where the same seed gives the same everywhere."""
    key = f"{seed}:{state.layer}:{state.length}".encode()
    digest = hashlib.blake2b(key, digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.rand(shape, generator=generator)
