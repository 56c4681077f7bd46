"""What a call must not leave behind: changed arguments, a random state drawn from."""

import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pytest_kvguard.policies.base import DecodeState, LayerState

State = TypeVar("State", LayerState, DecodeState)


def copied(state: State) -> State:
    """Return a state with tensors of its own; what else it has cannot be changed."""
    own: dict[str, Any] = {}
    for field in _given(state):
        value = getattr(state, field.name)
        own[field.name] = value.clone() if isinstance(value, Tensor) else value
    return replace(state, **own)


def changed(before: State, now: State) -> str:
    """Say which field of a state is no longer what it was; "" if all are."""
    for field in _given(before):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if not (torch.equal(old, new) if isinstance(old, Tensor) else old == new):
            return f"changed the {field.name}"
    return ""


def _given(state: State) -> Iterator[Field[Any]]:
    """Yield the fields a state is made with, not what it remembers."""
    return (field for field in fields(state) if field.init)


def draws(call: Callable[[], object]) -> str:
    """Say which global random state a call draws from; "" if none."""
    before = _random_states()
    call()
    drawn = [name for name, now in _random_states().items() if now != before[name]]
    return f"drew from the random state of {drawn[0]}" if drawn else ""


def _random_states() -> dict[str, object]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": pickle.dumps(np.random.get_state()),
        "random": random.getstate(),
    }
