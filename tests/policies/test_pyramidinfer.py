from dataclasses import replace
from math import cos, floor, pi

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_kvguard.errors import InvalidArgument, Refused
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.budgets import keep_ratio, narrowing
from pytest_kvguard.policies.observe import window_attention
from tests.strategies import a_state


def budgets(length, layers, ratio, protected=()):
    budget = narrowing(0.2)
    return [
        budget(a_state(length, layer=layer, layers=layers, protected=protected), ratio)
        for layer in range(layers)
    ]


def published(length, layers, end, alike):
    """What the published code leaves after each layer, with nothing rounded away on the way."""
    left, kept = 1.0, []
    for layer in range(layers):
        left *= (1 - end) * (cos(pi * layer / layers) + 1) / 2 + end
        kept.append(alike + floor((length - alike) * left + 1e-9))
    return kept


def test_budgets_fall_along_the_cosine_of_the_published_code():
    found = budgets(1000, 12, 0.7)
    ends = [end / 10000 for end in range(10001)]
    assert found in [published(1000, 12, end, alike=200) for end in ends]
    assert found[0] == 1000  # the cosine begins at 1


@given(
    length=st.integers(1, 300),
    layers=st.integers(1, 9),
    ratio=st.floats(0.01, 1.0),
    protected=st.integers(0, 5),
)
def test_the_mean_is_within_the_ratio_and_close_to_it(length, layers, ratio, protected):
    stay = tuple(range(min(protected, length)))
    try:
        found = budgets(length, layers, ratio, stay)
    except Refused:
        return
    mean = keep_ratio(a_state(length, protected=stay), ratio)
    assert mean * layers - layers < sum(found) <= mean * layers
    assert found == sorted(found, reverse=True)
    assert found[-1] >= max(1, len(stay))


def test_deep_layers_keep_room_for_recent_positions():
    assert budgets(100, 6, 0.5)[-1] >= 20  # a fifth of the prompt
    assert budgets(100, 6, 0.1)[-1] >= 5  # half of the mean


@pytest.mark.parametrize("name", ["pyramidinfer", "pyramidinfer_kv"])
def test_votes_are_the_weighted_attention_of_recent_queries(name):
    state = a_state(40, heads=2, group=3)
    rated = get_policy(f"{name}(recent=0.25, sinks=2, distance=1.5)").importance(state)
    queries, keys = state.queries.double(), state.keys.double()
    expected = [0.0] * 40
    for order, at in enumerate(range(30, 40)):
        weight = 1 + 0.5 * order / 9
        for head in range(6):
            logits = [float(queries[head, at] @ keys[head // 3, k]) * 0.7 for k in range(at + 1)]
            powers = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
            for k, power in enumerate(powers):
                expected[k] += weight * power / 6 / 10
    assert torch.equal(rated[0], rated[1])
    torch.testing.assert_close(rated[0, 2:], torch.tensor(expected[2:]), rtol=1e-4, atol=1e-6)
    assert (rated[:, :2] > rated[:, 2:].max()).all()


def test_what_is_gone_neither_votes_nor_gets_any():
    alive = torch.ones(20, dtype=torch.bool)
    alive[[5, 17]] = False
    state = replace(a_state(20), alive=alive)
    rated = get_policy("pyramidinfer").importance(state)
    assert (rated[:, ~alive] == float("-inf")).all()
    changed = replace(state, queries=state.queries.clone(), keys=state.keys.clone())
    changed.queries[:, [5, 17]] = 9.0
    changed.keys[:, [5, 17]] = 9.0
    assert torch.equal(get_policy("pyramidinfer").importance(changed), rated)


def test_attention_falls_on_what_is_alive_alone():
    state = replace(a_state(12), alive=torch.arange(12) % 3 != 0)
    attention = window_attention(state, 12)
    assert torch.allclose(attention.sum(-1), torch.ones(()))
    gone = attention[..., ~state.alive]
    assert int((gone > 0).sum()) == 4 * 4  # of each head, four queries that see themselves


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("pyramidinfer(recent=1.5)", "recent must be in"),
        ("pyramidinfer(sinks=-1)", "sinks must be"),
        ("pyramidinfer(distance=0)", "distance must be a finite number above 0, got 0"),
        ("pyramidinfer_kv(distance=far)", "distance must be a finite number above 0, got 'far'"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(spec, said):
    with pytest.raises(InvalidArgument, match=said):
        get_policy(spec)
