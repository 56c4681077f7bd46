"""Cache positions and shared selections: where keys stand, and which layers choose.

Cache positions: Xiao et al., 2023 (StreamingLLM), https://arxiv.org/abs/2309.17453
Shared selections: Liu et al., 2025 (ChunkKV), https://arxiv.org/abs/2502.00299
"""

from dataclasses import replace

from pytest_kvguard.parameters import check_count
from pytest_kvguard.policies.base import LayerState, Modifier, Policy
from pytest_kvguard.policies.modify import modified


def rerotated() -> Modifier:
    """Move each key that stays to its index in the cache, as if nothing had been between."""
    return lambda policy: modified(policy, "rerotated", {}, rerotate=True)


def reuse(layers: int = 2) -> Modifier:
    """Let this many neighbouring ``layers`` share the first one's selection.

    Where their budgets differ, as under pyramidkv, all of them get the smallest.
    """
    check_count("layers", layers)

    def modify(policy: Policy) -> Policy:
        def smallest(state: LayerState, ratio: float) -> int:
            start = state.layer - state.layer % layers
            group = range(start, min(start + layers, state.layers))
            return min(policy.budget(replace(state, layer=layer), ratio) for layer in group)

        return modified(policy, "reuse", {"reuse_layers": layers}, budget=smallest, reuse=layers)

    return modify
