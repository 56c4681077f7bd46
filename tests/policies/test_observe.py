from dataclasses import replace

import pytest
import torch

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies.observe import summed_attention, window_attention
from tests.policies import oracles
from tests.strategies import a_state


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("window", [1, 4, 9, 50])
def test_window_attention_is_the_causal_softmax_of_the_last_queries(heads, group, length, window):
    state = a_state(length, heads=heads, group=group)
    width = min(window, length)
    expected = torch.tensor(oracles.attention(state))[:, -width:]
    seen = window_attention(state, window)
    assert seen.shape == (heads, group, width, length)
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen.flatten(0, 1), expected.float())


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_soft_caps_and_attention_sinks_are_those_of_the_model(softcap, sinks):
    state = a_state(9, heads=2, group=2)
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0]) if sinks else None
    state = replace(state, softcap=softcap, sinks=logits)
    seen = window_attention(state, 4).flatten(0, 1)
    torch.testing.assert_close(seen, torch.tensor(oracles.attention(state))[:, -4:].float())
    total = seen.sum(dim=-1)
    assert bool((total < 0.999).all()) if sinks else torch.allclose(total, torch.ones(4, 4))


def test_the_last_queries_vote_when_only_those_were_recorded():
    whole, last = a_state(9), a_state(9, window=3)
    torch.testing.assert_close(window_attention(last, 3), window_attention(whole, 3))


def test_half_precision_states_are_observed_in_float32():
    state = a_state(9)
    half = replace(state, keys=state.keys.bfloat16(), queries=state.queries.bfloat16())
    again = replace(state, keys=half.keys.float(), queries=half.queries.float())
    assert torch.equal(window_attention(half, 4), window_attention(again, 4))


def test_fewer_recorded_queries_than_the_window_are_an_error_with_the_numbers():
    with pytest.raises(InvalidArgument, match="a window of 5 needs as many queries, but 3 were"):
        window_attention(a_state(9, window=3), 5)


def test_summed_attention_groups_the_query_heads_of_each_kv_head():
    state = a_state(5, heads=2, group=3)
    sums = summed_attention(state)
    assert sums.shape == (2, 3, 5)
    assert torch.equal(sums[1, 0], state.attention_sums[3])


def test_sums_that_were_not_recorded_are_an_error_that_says_how_to_get_them():
    with pytest.raises(InvalidArgument, match="set the policy's `needs_sums` to True"):
        summed_attention(replace(a_state(5), attention_sums=None))
