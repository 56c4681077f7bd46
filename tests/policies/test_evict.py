from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies import POLICIES, get_policy
from pytest_kvguard.policies.base import EMPTY, DecodeEviction, DecodeState
from pytest_kvguard.policies.evict import (
    attention_of_all_heads,
    rolling_slots,
    victims,
    victims_at_once,
)
from tests.strategies import decode_states


def eviction(allowed, candidates=lambda state: torch.ones_like(state.held)):
    return DecodeEviction(
        importance=lambda state: state.sums,
        candidates=candidates,
        allowed=lambda state: allowed,
        slots=rolling_slots,
    )


def slow_victims(state, candidates, allowed):
    """The slot each head frees, by loops over the sentence in `DecodeEviction`."""
    out = []
    for row, heads in enumerate(state.positions.tolist()):
        out.append([])
        for head, slots in enumerate(heads):
            held = [
                slot
                for slot, position in enumerate(slots)
                if position not in (EMPTY, int(state.newest[row])) and candidates[row, head, slot]
            ]
            held.sort(key=lambda slot: (float(state.sums[row, head, slot]), -slots[slot]))
            limit = int(allowed[row] if allowed.dim() == 1 else allowed[row, head])
            out[-1].append(held[0] if len(held) > max(0, limit) else -1)
    return out


@given(state=decode_states(), data=st.data())
def test_victims_are_those_of_the_slow_loop(state, data):
    rows, heads, slots = state.positions.shape
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    candidates = torch.rand(rows, heads, slots, generator=generator) < 0.8
    shape = data.draw(st.sampled_from([(rows,), (rows, heads)]))
    allowed = torch.randint(-2, slots + 1, shape, generator=generator)
    found = victims(eviction(allowed, lambda state: candidates), state)
    assert found.tolist() == slow_victims(state, candidates, allowed)


@given(state=decode_states())
def test_attention_of_all_heads_is_the_mean_over_the_query_heads_that_hold_a_position(state):
    found = attention_of_all_heads(state)
    rows, heads, slots = state.positions.shape
    group = state.weights.shape[1] // heads
    for row in range(rows):
        votes: dict[int, list[float]] = {}
        places = [(head, slot) for head in range(heads) for slot in range(slots)]
        for head, slot in places:
            own = state.weights[row, head * group : (head + 1) * group, slot].double().tolist()
            votes.setdefault(int(state.positions[row, head, slot]), []).extend(own)
        for head, slot in places:
            position = int(state.positions[row, head, slot])
            held = votes[position] if position != EMPTY else [0.0]
            expected = sum(held) / len(held)
            assert float(found[row, head, slot]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8])
def test_heads_that_hold_the_same_round_as_those_that_do_not(heads):
    generator = torch.Generator().manual_seed(heads)
    held = torch.stack([torch.randperm(60, generator=generator)[:40] for _ in range(4)])
    positions = held[:, None].repeat(1, heads, 1)
    positions[:, :, 5] = EMPTY
    weights = torch.rand(4, 3 * heads, 40, generator=generator)
    state = replace(a_decode_state([0]), positions=positions, weights=weights)
    other = positions.clone()
    other[0, -1] = other[0, -1].flip(0)  # in other slots: all rows go the long way
    assert heads == 1 or not torch.equal(other, positions)
    apart = replace(state, positions=other)
    torch.testing.assert_close(
        attention_of_all_heads(apart)[1:], attention_of_all_heads(state)[1:], rtol=0, atol=0
    )


@given(state=decode_states(), more=st.integers(1, 40))
def test_to_know_a_limit_of_all_positions_changes_nothing(state, more):
    limited = replace(state, limit=int(state.positions.max()) + more)
    torch.testing.assert_close(
        attention_of_all_heads(limited), attention_of_all_heads(state), rtol=0, atol=0
    )


@pytest.mark.parametrize("limit", [None, 9])
@pytest.mark.parametrize("name", [n for n in POLICIES if get_policy(n).decode is not None])
def test_nothing_waits_for_the_device(name, limit):
    """On a device that holds no numbers, asking for one raises."""
    state = protected(a_decode_state([*range(8), EMPTY], sums=[0.0] * 9), 2, 3)
    tensors = {
        f.name: getattr(state, f.name) for f in fields(state) if f.init and f.name != "limit"
    }
    there = {name: tensor.to("meta") for name, tensor in tensors.items()}
    decode = get_policy(name).decode
    assert victims(decode, DecodeState(**there, limit=limit)).device.type == "meta"
    assert victims_at_once(decode, DecodeState(**there, limit=limit)).device.type == "meta"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("burst", [1, 2, 5, 60])
def test_what_goes_at_once_is_what_would_go_one_after_the_other(burst, seed):
    """Of equals the latest; protected ones and the newest stay; heads differ in what they hold."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack(
        [torch.randperm(50, generator=generator)[:40] for _ in range(6)]
    ).unflatten(0, (2, 3))
    positions[torch.rand(2, 3, 40, generator=generator) < 0.2] = EMPTY
    ratings = torch.randint(0, 4, (2, 3, 50), generator=generator).float()
    eviction = DecodeEviction(
        importance=lambda state: ratings.gather(2, state.positions.clamp(min=0)),
        candidates=lambda state: state.positions % 7 != 0,
        allowed=lambda state: torch.tensor([11, 19]),
        slots=lambda budget, new, ratio: 40,
        burst=burst,
    )
    state = DecodeState(
        weights=torch.zeros(2, 3, 40),
        sums=None,
        positions=positions,
        newest=positions.amax(dim=(1, 2)),
        prompt_length=torch.tensor([30, 30]),
        budget=torch.tensor([20, 20]),
        ratio=torch.tensor([0.5, 0.5], dtype=torch.float64),
        protected=positions % 5 == 0,
    )
    one_by_one = state.positions.clone()
    for _ in range(burst):
        slot = victims(eviction, replace(state, positions=one_by_one.clone())).unsqueeze(-1)
        gone = torch.zeros_like(one_by_one, dtype=torch.bool)
        one_by_one[gone.scatter_(2, slot.clamp(min=0), slot != EMPTY)] = EMPTY
    at_once = positions.masked_fill(victims_at_once(eviction, state), EMPTY)
    assert torch.equal(at_once, one_by_one)
    assert not torch.equal(at_once, positions)


def a_decode_state(positions, sums=None, **changes):
    """One row, one head."""
    held = torch.tensor([[positions]])
    state = DecodeState(
        weights=torch.zeros(1, 1, len(positions)),
        sums=None if sums is None else torch.tensor([[sums]], dtype=torch.float32),
        positions=held,
        newest=held.amax(dim=(1, 2)),
        prompt_length=torch.tensor([4]),
        budget=torch.tensor([len(positions)]),
        ratio=torch.tensor([0.5], dtype=torch.float64),
    )
    return replace(state, **changes)


def victim(policy, state):
    """The position freed, or None."""
    slot = int(victims(policy.decode, state))
    return None if slot == -1 else int(state.positions[0, 0, slot])


def test_of_equals_the_latest_goes():
    state = a_decode_state([3, 0, 5, 2], sums=[1, 1, 0, 1])
    assert int(victims(eviction(torch.tensor([2])), state)) == 0


def test_nothing_goes_while_as_many_as_allowed_are_held():
    state = a_decode_state([3, 0, 5, EMPTY], sums=[1, 1, 0, 0])
    assert int(victims(eviction(torch.tensor([2])), state)) == -1


def test_the_newest_token_stays_though_it_is_the_least_important():
    state = a_decode_state([3, 0, 5], sums=[2, 1, 0])
    assert int(victims(eviction(torch.tensor([0])), state)) == 1


def test_candidates_of_infinite_importance_can_go_but_free_slots_cannot():
    state = a_decode_state([EMPTY, 1, 2, 5], sums=[0, float("inf"), float("inf"), 0])
    assert int(victims(eviction(torch.tensor([1])), state)) == 2


# three heads look at slot 1 more, all four together at slot 2
ONE_HEAD_DECIDES = torch.tensor([[[0, 0.6, 0.4], [0, 0.1, 0.9], [0, 0.6, 0.4], [0, 0.6, 0.4]]])


class TestStreamingLLM:
    def test_the_oldest_token_that_is_no_sink_goes(self):
        policy = get_policy("streaming_llm(sinks=2)")
        assert victim(policy, a_decode_state([6, 0, 4, 1, 5])) == 4

    def test_nothing_goes_while_the_next_token_has_room(self):
        policy = get_policy("streaming_llm(sinks=2)")
        assert victim(policy, a_decode_state([6, 0, 5, 1, EMPTY])) is None

    def test_sinks_without_room_for_two_more_go_from_the_first_on(self):
        policy = get_policy("streaming_llm(sinks=4)")
        assert victim(policy, a_decode_state([0, 1, 2, 9])) == 2
        assert victim(policy, a_decode_state([0, 9])) == 0


def protected(state, *positions):
    return replace(state, protected=torch.isin(state.positions, torch.tensor(positions)))


def test_what_is_protected_stays_and_is_charged_to_the_budget():
    # N = 6: the next token takes one, two are protected, and so three more may be held
    state = a_decode_state([8, 0, 1, 4, 5, 7], weights=torch.tensor([[[0, 0, 0.1, 0.2, 0.3, 0.4]]]))
    assert victim(get_policy("tova"), state) == 0
    assert victim(get_policy("tova"), protected(state, 0, 1)) == 4
    fewer = replace(state, budget=torch.tensor([7]))
    assert victim(get_policy("tova"), protected(fewer, 0, 1)) is None


@pytest.mark.parametrize("spec", ["h2o(heavy=0)", "tova", "streaming_llm(sinks=4)"])
def test_where_all_is_protected_the_newest_token_and_the_next_have_room(spec):
    state = protected(a_decode_state([0, 1, 2, 3, 8, 9], sums=[1] * 6), 0, 1, 2, 3)
    assert victim(get_policy(spec), replace(state, budget=torch.tensor([4]))) == 8


class TestTova:
    def test_the_position_with_least_attention_over_all_heads_goes(self):
        state = a_decode_state([7, 1, 2])
        both = replace(
            state,
            positions=state.positions.expand(1, 2, -1),
            weights=ONE_HEAD_DECIDES,
        )
        assert victims(get_policy("tova").decode, both).tolist() == [[1, 1]]


class TestH2O:
    def test_the_least_heavy_position_that_is_not_recent_goes(self):
        # N = 6: 3 heavy, 3 recent; with the next token, 8 and 7 are recent
        state = a_decode_state([8, 7, 1, 6, 2, 3], sums=[0, 0, 3, 2, 5, 4])
        assert victim(get_policy("h2o"), state) == 6

    def test_the_share_of_heavy_hitters_can_be_set(self):
        # N = 6: 1 heavy, 5 recent; with the next token, 8, 7, 6 and 5 are recent
        state = a_decode_state([8, 7, 6, 5, 2, 3], sums=[0, 0, 0, 0, 5, 4])
        assert victim(get_policy("h2o(heavy=0.2)"), state) == 3

    def test_sums_that_are_missing_are_an_error(self):
        with pytest.raises(InvalidArgument, match="pass `sums`"):
            victims(get_policy("h2o").decode, a_decode_state([1, 2]))

    def test_sums_are_carried_on_from_the_prompt(self):
        assert get_policy("h2o").decode.accumulate
        assert get_policy("h2o").needs_sums


class TestShotKV:
    @staticmethod
    def state(*positions, weights, prompt=4):
        return a_decode_state(
            list(positions),
            weights=torch.tensor([[weights]]),
            prompt_length=torch.tensor([prompt]),
        )

    def test_the_generated_token_with_least_attention_now_goes(self):
        # 4 generated, 2 of them stay: the newest and one more
        state = self.state(0, 7, 4, 5, weights=[0.0, 0.0, 0.4, 0.1])
        assert victim(get_policy("shotkv"), state) == 5

    def test_tokens_of_the_prompt_never_go(self):
        state = self.state(0, 1, 2, 3, 4, weights=[0.0] * 5)
        assert victim(get_policy("shotkv"), state) is None

    def test_the_share_is_of_all_tokens_generated_so_far_and_at_least_the_newest_stays(self):
        # 3 generated, half of them is 1: only the newest stays
        state = self.state(0, 6, 5, weights=[0.0, 0.0, 0.9])
        assert victim(get_policy("shotkv"), state) == 5
        # 6 generated, 3 may stay, though 2 went already
        state = self.state(0, 9, 8, 6, weights=[0.0, 0.0, 0.1, 0.9])
        assert victim(get_policy("shotkv"), state) is None

    def test_heads_add_up_their_attention(self):
        state = self.state(7, 4, 5, weights=[0.0, 0.4, 0.1])
        two = replace(
            state,
            positions=state.positions.expand(1, 2, -1),
            weights=ONE_HEAD_DECIDES,
        )
        assert victims(get_policy("shotkv").decode, two).tolist() == [[1, 1]]
