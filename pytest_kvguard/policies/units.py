"""Which positions units cover, and which must stay under a policy that keeps whole units."""

import torch
from torch import Tensor

from pytest_kvguard.policies.base import LayerState, Unit


def positions_of(unit: Unit) -> list[int]:
    """Return the positions of a unit, span after span."""
    return [position for span in unit for position in span]


def must_stay(state: LayerState) -> Tensor:
    """Return what no unit decides about: protected positions and those outside units, (T,) bool."""
    staying = torch.ones_like(state.protected)
    for unit in state.units:
        staying[positions_of(unit)] = False
    return staying | state.protected
