"""What `layer_states` draws is what a policy can meet."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings

from pytest_kvguard.laws import layer_states, ratios
from tests.policies import oracles

SEARCH = settings(
    max_examples=1000,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

MET = {
    "a single position": lambda s: s.length == 1,
    "the longest prompt": lambda s: s.length == 48,
    "a window shorter than the prompt": lambda s: s.queries.shape[1] < s.length,
    "a window as long as the prompt": lambda s: s.queries.shape[1] == s.length > 1,
    "four query heads to a key/value head": lambda s: len(s.queries) == 4 * len(s.keys),
    "half precision": lambda s: s.keys.dtype == torch.bfloat16,
    "equal keys": lambda s: s.length > 8 and bool((s.keys == s.keys[0, 0]).all()),
    "no unit": lambda s: not s.units,
    "a unit of several spans": lambda s: any(len(unit) > 1 for unit in s.units),
    "one giant unit": lambda s: s.units == ((range(s.length),),),
    "a gap between units": lambda s: len(s.units) > 1 and s.units[0][0].start > 0,
    "a protected position inside a unit": lambda s: any(
        s.protected[span.start] for unit in s.units for span in unit
    ),
    "nothing protected": lambda s: not s.protected.any(),
    "an early layer of several": lambda s: s.layer == 0 and s.layers > 2,
    "the last layer": lambda s: s.layer == s.layers - 1 > 0,
}


@pytest.mark.parametrize("what", MET)
def test_every_boundary_is_met(what):
    find(layer_states(window=8), MET[what], settings=SEARCH)


@given(state=layer_states(window=5, min_units=1, max_length=12))
@settings(max_examples=40, deadline=None)
def test_a_drawn_state_keeps_the_contract_of_states(state):
    heads, length = state.keys.shape[0], state.length
    assert state.queries.shape[1] == min(5, length)
    assert state.attention_sums.shape == (len(state.queries), length)
    assert len(state.queries) % heads == 0
    positions = [at for unit in state.units for span in unit for at in span]
    assert 0 < len(positions) == len(set(positions))
    assert all(0 <= at < length for at in positions)
    assert all(unit == tuple(sorted(unit, key=lambda span: span.start)) for unit in state.units)


@given(state=layer_states(max_length=12))
@settings(max_examples=40, deadline=None)
def test_drawn_sums_are_those_of_causal_attention(state):
    expected = torch.tensor(oracles.attention(state)).sum(dim=1)
    torch.testing.assert_close(state.attention_sums, expected.float())


@given(ratio=ratios())
def test_drawn_ratios_are_keep_ratios(ratio):
    assert 0 < ratio <= 1
