"""What the laws are tried on is what a policy can meet."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings

from pytest_kvguard import laws
from pytest_kvguard.laws import check_policy, decode_states, layer_states, ratios
from pytest_kvguard.laws.answer import STEPS
from pytest_kvguard.laws.memory import LONG_ANSWER
from pytest_kvguard.laws.ordinary import LONGEST, corner_prompts
from pytest_kvguard.policies import POLICIES, get_policy
from pytest_kvguard.policies.base import EMPTY, LayerState
from tests.policies import oracles

LEAST = 2
"""How often each boundary is met at least, on policies that keep tokens."""

MET: dict[str, Callable[[LayerState], bool]] = {
    "two positions": lambda s: s.length == 2,
    "a prompt longer than most": lambda s: s.length > 300,
    "a window shorter than the prompt": lambda s: s.queries.shape[1] < s.length,
    "a window as long as the prompt": lambda s: s.queries.shape[1] == s.length > 1,
    "a single key/value head": lambda s: len(s.keys) == 1,
    "four key/value heads": lambda s: len(s.keys) == 4,
    "three query heads to a key/value head": lambda s: len(s.queries) == 3 * len(s.keys),
    "seven query heads to a key/value head": lambda s: len(s.queries) == 7 * len(s.keys),
    "bfloat16": lambda s: s.keys.dtype == torch.bfloat16,
    "float16": lambda s: s.keys.dtype == torch.float16,
    "large heads": lambda s: s.keys.shape[-1] == 16,
    "keys laid out by position": lambda s: not s.keys.is_contiguous(),
    "equal keys": lambda s: s.length > 8 and bool((s.keys == s.keys[0, 0]).all()),
    "keys that are zero among others": lambda s: bool(
        (s.keys == 0).all(dim=-1).any() and (s.keys != 0).any()
    ),
    "no unit": lambda s: not s.units,
    "a unit of several spans": lambda s: any(len(unit) > 1 for unit in s.units),
    "a unit of one position": lambda s: any(len(u) == len(u[0]) == 1 for u in s.units),
    "many units": lambda s: len(s.units) > 20,
    "one giant unit": lambda s: s.units == ((range(s.length),),),
    "a gap between units": lambda s: len(s.units) > 1 and s.units[0][0].start > 0,
    "a protected position inside a unit": lambda s: any(
        s.protected[span.start] for unit in s.units for span in unit
    ),
    "nothing protected": lambda s: not s.protected.any(),
    "only the end protected": lambda s: bool(s.protected[-1]) and int(s.protected.sum()) == 1,
    "much protected": lambda s: int(s.protected.sum()) > 6,
    "no passage": lambda s: not s.passages,
    "a template in front": lambda s: bool(s.passages) and s.passages[0].kind == "template",
    "no special token": lambda s: not s.special.any(),
    "several special tokens": lambda s: int(s.special.sum()) > 1,
    "nothing but punctuation": lambda s: bool(s.punctuation.all()),
    "an early layer of several": lambda s: s.layer == 0 and s.layers > 2,
    "a layer in the middle": lambda s: 0 < s.layer < s.layers - 1,
    "the last layer": lambda s: s.layer == s.layers - 1 > 0,
    "a layer far up": lambda s: s.layer > 20,
    "the only layer": lambda s: s.layers == 1,
}


@pytest.fixture(scope="module")
def tried():
    """What `check_policy` tries on a policy that observes a window and evicts while decoding."""
    prompts, steps = [], []

    def note(trials):
        return {"noted": lambda trial: trials.append(trial) or ""}

    policy = get_policy("snapkv(window=32)+h2o")
    with pytest.MonkeyPatch.context() as patched:
        for name, trials in [("PREFILL_LAWS", prompts), ("DECODE_LAWS", steps)]:
            kept = dict.fromkeys(getattr(laws, name), lambda trial: "")
            patched.setattr(laws, name, kept | note(trials))
        check_policy(policy)
    evicted = [t.state for t in prompts if t.mask is not None and not t.mask.all()]
    freed = [t for t in steps if bool((t.frees(t.state) != EMPTY).any())]
    return prompts, evicted, [trial.state for trial in freed], steps


@pytest.mark.parametrize("what", MET)
def test_every_boundary_is_met_where_something_is_evicted(what, tried):
    assert sum(bool(MET[what](state)) for state in tried[1]) >= LEAST


def test_ordinary_prompts_are_longer_than_what_our_policies_have_by_default():
    for name, make in POLICIES.items():
        params = make().params
        sizes = [params.get(key, 0) for key in ("window", "sinks", "page", "length", "recent")]
        assert sum(sizes) + 2 * params.get("lag", 0) < LONGEST, name


@pytest.mark.parametrize(("low", "high"), [(0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1), (1, 1.1)])
def test_ratios_are_met_up_to_both_ends(low, high, tried):
    assert sum(low <= trial.ratio < high for trial in tried[0]) >= LEAST


def test_a_single_position_is_met(tried):
    assert sum(trial.state.length == 1 for trial in tried[0]) >= LEAST


@pytest.mark.parametrize("kept", [False, True], ids=["any", "at least one"])
def test_units_are_met_in_every_form_by_a_policy_that_keeps_them(kept):
    forms = [state.units for state, _ in corner_prompts(need_units=kept)]
    assert all(forms) == kept
    assert any(len(unit) > 1 for units in forms for unit in units)


def test_layers_before_drop_little_or_much_where_a_policy_narrows():
    alive = [state.alive.float().mean() for state, _ in corner_prompts(narrowed=True)]
    assert min(alive) < 0.5 < max(alive) == 1
    assert all(state.alive is None for state, _ in corner_prompts())


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
    "nothing said about protection": lambda s: s.protected is None,
    "rows of different lengths": lambda s: len(s.newest.unique()) == 3,
    "an answer of ten tokens": lambda s: bool((s.newest - s.prompt_length > 10).any()),
    "an answer of fifty tokens": lambda s: bool((s.newest - s.prompt_length > 50).any()),
    "many slots": lambda s: s.positions.shape[-1] > 60,
    "four heads": lambda s: s.positions.shape[1] == 4,
    "four query heads to a key/value head": lambda s: (
        s.weights.shape[1] == 4 * s.positions.shape[1]
    ),
    "a budget of one": lambda s: bool((s.budget == 1).any()),
}


@pytest.mark.parametrize("what", MET_WHILE_DECODING)
def test_every_boundary_is_met_where_something_is_freed(what, tried):
    assert sum(bool(MET_WHILE_DECODING[what](state)) for state in tried[2]) >= LEAST


def test_a_single_slot_and_a_prompt_that_has_no_answer_yet_are_met(tried):
    states = [trial.state for trial in tried[3]]
    assert sum(state.positions.shape[-1] == 1 for state in states) >= LEAST
    assert sum(not state.generated.any() for state in states) >= LEAST


def test_answers_are_longer_than_policies_count(tried):
    lengths = [len(trial.answered()) for trial in tried[3]]
    assert max(lengths) == LONG_ANSWER + 1
    assert lengths.count(STEPS + 1) > len(lengths) / 2
    ours = [get_policy(name).params for name, make in POLICIES.items() if make().decode]
    assert {"every", "window"} <= {key for params in ours for key in params}
    assert max(params.get("every", 0) for params in ours) < STEPS
    assert max(params.get("window", 0) for params in ours) < LONG_ANSWER


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
