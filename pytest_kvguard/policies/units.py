"""Which positions units cover, and which must stay under a policy that keeps whole units."""

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies.base import LayerState, Unit


def positions_of(unit: Unit) -> list[int]:
    """Return the positions of a unit, span after span."""
    return [position for span in unit for position in span]


def check_units(state: LayerState) -> None:
    """Raise InvalidArgument for a prompt without units."""
    if not state.units:
        raise InvalidArgument(
            f"this prompt has no units of the kind {state.unit_kind!r} to keep whole; choose units "
            f"that it has, such as --kv-units=sentences, or a policy that keeps tokens, such as "
            f"snapkv, h2o or streaming_llm"
        )


def must_stay(state: LayerState) -> Tensor:
    """Return what no unit decides about: protected positions and those outside units, (T,) bool."""
    staying = torch.ones_like(state.protected)
    for unit in state.units:
        staying[positions_of(unit)] = False
    return staying | state.protected
