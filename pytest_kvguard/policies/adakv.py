"""AdaKV: SnapKV, or PyramidKV, with heads that compete for the budget of their layer.

Feng et al., 2024, https://arxiv.org/abs/2407.11550

importance  SnapKV's: attention paid by the last `window` queries, smoothed
budget      given; the same for every layer, or PyramidKV's; it is the mean of the layer's heads
selection   the top positions of all key/value heads together, so that heads whose attention is
            spread out keep more; the window stays before any other

Differs from the paper: the safeguard lets each head first keep its own best, a `floor` share of
the mean budget, where the published code mixes the counts that competing gives with the mean and
rounds them; query heads that share a key/value head add up their votes; the keep ratio sets
window and rest together; smoothing is SnapKV's by default.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pytest_kvguard.parameters import frozen
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.policies.pyramidkv import pyramidkv
from pytest_kvguard.policies.selectors import top_over_heads
from pytest_kvguard.policies.snapkv import snapkv


def adakv(window: int = 32, kernel: int = 5, floor: float = 0.2) -> Policy:
    """Keep what SnapKV would if the heads of a layer shared one budget.

    ``floor``: the share of the mean budget that every head is sure of.
    """
    params = frozen(window=window, kernel=kernel, floor=floor)
    return _competing("adakv", snapkv(window, kernel), floor, params)


def adapyramidkv(window: int = 32, kernel: int = 5, beta: int = 20, floor: float = 0.2) -> Policy:
    """Keep what PyramidKV would if the heads of a layer shared one budget."""
    params = frozen(window=window, kernel=kernel, beta=beta, floor=floor)
    return _competing("adapyramidkv", pyramidkv(window, kernel, beta), floor, params)


def _competing(name: str, host: Policy, floor: float, params: Mapping[str, Any]) -> Policy:
    select = top_over_heads(floor)
    return replace(host, name=name, select=select, params=params, shares_heads=True)
