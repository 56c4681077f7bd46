"""What `layer_states` draws is what a policy can meet."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings

from pytest_kvguard.laws import decode_states, layer_states, ratios
from pytest_kvguard.policies.base import EMPTY
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


MET_WHILE_DECODING = {
    "a free slot": lambda s: not s.held.all(),
    "no free slot": lambda s: bool(s.held.all()) and s.positions.shape[-1] > 2,
    "a single slot": lambda s: s.positions.shape[-1] == 1,
    "the last token of the prompt, fed again": lambda s: bool((s.newest < s.prompt_length).any()),
    "both prompt and answer": lambda s: bool(
        s.generated[0, 0].any() and (s.held & ~s.generated)[0, 0].any()
    ),
    "heads that hold the same in other slots": lambda s: (
        s.positions.shape[1] == 2
        and s.positions.shape[2] > 3
        and torch.equal(s.positions[:, 0].sort()[0], s.positions[:, 1].sort()[0])
        and not torch.equal(s.positions[:, 0], s.positions[:, 1])
    ),
    "heads that hold different positions": lambda s: (
        s.positions.shape[1] == 2
        and not torch.equal(s.positions[:, 0].sort()[0], s.positions[:, 1].sort()[0])
    ),
    "nothing but equal weights": lambda s: (
        int(s.held[0, 0].sum()) > 3 and len(s.weights[0, 0].unique()) <= 2
    ),
    "sums left over in a free slot": lambda s: bool((s.sums[~s.held] > 0).any()),
    "a prompt of which some is protected": lambda s: bool(
        s.protected is not None
        and s.protected.any()
        and (s.held & ~s.generated & ~s.protected).any()
    ),
    "a prompt that is all protected": lambda s: bool(
        s.protected is not None
        and (s.held & ~s.generated).sum() > 4
        and torch.equal(s.protected, s.held & ~s.generated)
    ),
    "rows of different lengths": lambda s: len(s.newest.unique()) == 3,
}


@pytest.mark.parametrize("what", MET_WHILE_DECODING)
def test_every_boundary_is_met_while_decoding(what):
    find(decode_states(), MET_WHILE_DECODING[what], settings=SEARCH)


@given(state=decode_states())
@settings(max_examples=60, deadline=None)
def test_a_drawn_step_keeps_the_contract_of_steps(state):
    newest = state.newest[:, None, None]
    assert ((state.positions == newest).sum(dim=-1) == 1).all()
    assert ((state.positions >= EMPTY) & (state.positions <= newest)).all()
    for slots in state.positions.flatten(0, 1).tolist():
        held = [position for position in slots if position != EMPTY]
        assert len(held) == len(set(held))
    if state.protected is not None:
        assert not (state.protected & (state.generated | ~state.held)).any()
    group = state.weights.shape[1] // state.positions.shape[1]
    assert not state.weights[~state.held.repeat_interleave(group, dim=1)].any()
    torch.testing.assert_close(state.weights.sum(-1), torch.ones(state.weights.shape[:2]))


@given(state=decode_states(sums=False))
@settings(max_examples=20, deadline=None)
def test_sums_are_drawn_only_for_a_policy_that_accumulates(state):
    assert state.sums is None


@given(ratio=ratios())
def test_drawn_ratios_are_keep_ratios(ratio):
    assert 0 < ratio <= 1
