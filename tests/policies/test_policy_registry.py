import json
from dataclasses import replace

import pytest
import torch

from pytest_kvguard.errors import InvalidArgument, UnknownName
from pytest_kvguard.policies import POLICIES, get_policy, register_policy
from pytest_kvguard.policies.knorm import knorm
from pytest_kvguard.specs import Spec
from tests.strategies import a_state

UNITS = tuple((range(at, at + 5),) for at in range(0, 40, 5))


def test_every_policy_is_known_under_its_own_name():
    assert {name: get_policy(name).name for name in POLICIES} == {name: name for name in POLICIES}


def test_the_full_cache_is_not_a_policy():
    with pytest.raises(UnknownName, match="unknown policy 'full'"):
        get_policy("full")


def test_a_misspelt_name_gets_a_hint():
    with pytest.raises(UnknownName, match="did you mean 'snapkv'"):
        get_policy("snapkw")


def test_parameters_are_read_from_the_spec_and_kept_with_the_defaults():
    policy = get_policy("snapkv(window=16)")
    assert policy.params == {"window": 16, "kernel": 5, "pooling": "avg"}
    assert policy.window == 16
    assert get_policy(Spec("snapkv", {"window": 16})).params == policy.params


def test_parameters_can_be_stored_as_json():
    for name in POLICIES:
        params = get_policy(name).params
        assert json.loads(json.dumps(dict(params))) == params


def test_parameters_cannot_be_changed():
    with pytest.raises(TypeError):
        get_policy("snapkv").params["window"] = 1


def test_an_unknown_parameter_is_named():
    with pytest.raises(UnknownName, match="unknown parameter of knorm 'window'"):
        get_policy("knorm(window=3)")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adakv(floor=1.5)", r"floor must be in \[0, 1\], got 1.5"),
        ("adapyramidkv(beta=0)", "beta must be a whole number of at least 1, got 0"),
        ("chunkkv(window=0)", "window must be a whole number of at least 1, got 0"),
        ("chunkkv(length=0)", "length must be a whole number of at least 1, got 0"),
        ("chunkkv(reuse=0)", "reuse must be a whole number of at least 1, got 0"),
        ("criticalkv(first=-1)", r"first must be in \[0, 1\], got -1"),
        ("expected_attention(future=0)", "future must be a whole number of at least 1, got 0"),
        ("fastgen(threshold=2)", r"threshold must be in \[0, 1\], got 2"),
        ("fastgen(frequent=none)", r"frequent must be in \[0, 1\], got None"),
        ("fastgen(local=1.1)", r"local must be in \[0, 1\], got 1.1"),
        ("lagkv(lag=1)", "lag must be a whole number of at least 2, got 1"),
        ("lagkv(sinks=-1)", "sinks must be a whole number of at least 0, got -1"),
        ("vatp(sinks=-1)", "sinks must be a whole number of at least 0, got -1"),
        ("h2o(heavy=1.5)", r"heavy must be in \[0, 1\], got 1.5"),
        ("h2o(heavy=none)", r"heavy must be in \[0, 1\], got None"),
        ("pyramidkv(beta=0)", "beta must be a whole number of at least 1, got 0"),
        ("pyramidkv(kernel=2)", "kernel must be odd, to have a middle; got 2"),
        ("random_shots(seed=-1)", "seed must be a whole number of at least 0, got -1"),
        ("random_tokens(seed=0.5)", "seed must be a whole number of at least 0, got 0.5"),
        ("shotkv(window=0)", "window must be a whole number of at least 1, got 0"),
        ("shotkv(rule=best)", "rule must be one of skip, stop; got 'best'"),
        ("shotkv(decode_ratio=0)", r"keep ratio must be in \(0, 1\], got 0"),
        ("snapkv(kernel=4)", "kernel must be odd, to have a middle; got 4"),
        ("snapkv(pooling=min)", "pooling must be one of avg, max; got 'min'"),
        ("snapkv(window=true)", "window must be a whole number of at least 1, got True"),
        ("streaming_llm(sinks=-1)", "sinks must be a whole number of at least 0, got -1"),
        ("streaming_llm(positions=new)", "positions must be one of original, cache; got 'new'"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_what_would_do(spec, message):
    with pytest.raises(InvalidArgument, match=message):
        get_policy(spec)


@pytest.mark.parametrize(
    ("name", "lacking", "message"),
    [
        ("criticalkv", {"output": None}, "which this model does not show; use .* vatp"),
        ("expected_attention", {"turn": None}, "set the policy's `needs_turn` to True"),
        ("expected_attention", {"queries": torch.ones(4, 3, 4)}, "3 of 9 were recorded"),
        ("fastgen", {"special": None}, "pass `special` and `punctuation`"),
        ("fastgen", {"punctuation": None}, "pass `special` and `punctuation`"),
        ("vatp", {"attention_sums": None}, "set the policy's `needs_sums` to True"),
    ],
)
def test_what_a_policy_looks_at_and_does_not_find_is_named(name, lacking, message):
    with pytest.raises(InvalidArgument, match=message):
        get_policy(name).keep(replace(a_state(9), **lacking), 0.5)


def test_a_registered_policy_is_made_like_any_other(monkeypatch):
    monkeypatch.setattr("pytest_kvguard.policies.POLICIES", dict(POLICIES))
    register_policy("mine", knorm)
    assert get_policy("mine").name == "knorm"


@pytest.mark.parametrize("name", ["snapkv", "full"])
def test_a_name_that_is_taken_cannot_be_registered(name):
    with pytest.raises(InvalidArgument, match=f"{name!r} is taken"):
        register_policy(name, knorm)


@pytest.mark.parametrize("name", ["two words", "a-b", "", "1st"])
def test_a_name_that_cannot_be_typed_cannot_be_registered(name):
    with pytest.raises(InvalidArgument, match="must be a Python identifier"):
        register_policy(name, knorm)


@pytest.mark.parametrize("name", ["random_tokens", "random_shots"])
def test_a_random_choice_changes_with_the_seed_and_the_layer_only(name):
    def choice(seed=0, layer=0, content=0):
        policy = get_policy(f"{name}(seed={seed})")
        state = a_state(40, units=UNITS, layer=layer, layers=2, seed=content)
        return policy.keep(state, 0.5).tolist()

    assert choice() == choice(content=9)
    assert choice() != choice(seed=1)
    assert choice() != choice(layer=1)


def test_random_tokens_differ_between_heads_and_are_not_biased_by_place():
    policy = get_policy("random_tokens")
    masks = torch.stack([policy.keep(a_state(40, layer=i), 0.5) for i in range(200)])
    assert not torch.equal(masks[0, 0], masks[0, 1])
    share = masks.double().mean(dim=(0, 1))  # 400 draws of probability 1/2: sd 0.025
    assert share.sub(0.5).abs().max() < 5 * 0.025


def test_random_shots_choose_every_unit_alike_whatever_its_length():
    units = ((range(0, 1),), (range(1, 11),), (range(11, 21),))
    policy = get_policy("random_shots")
    masks = torch.stack(
        [policy.keep(a_state(31, layer=i, layers=600, units=units), 20 / 31) for i in range(600)]
    )
    # 10 are outside and 10 more fit: the short unit stays where it is drawn first, once in three
    short = masks[:, 0, 0].double().mean()
    assert abs(short - 1 / 3) < 5 * (2 / 9 / 600) ** 0.5


@pytest.mark.parametrize("name", ["tova", "chunkkv", "shotkv", "random_shots", "streaming_llm"])
def test_some_policies_keep_the_same_positions_in_every_head(name):
    mask = get_policy(name).keep(a_state(40, units=UNITS), 0.5)
    assert torch.equal(mask[0], mask[1])


def test_only_streaming_llm_at_cache_positions_moves_keys():
    moving = [name for name in POLICIES if get_policy(name).rerotate]
    assert moving == []
    assert get_policy("streaming_llm(positions=cache)").rerotate


def test_chunkkv_shares_a_selection_between_neighbouring_layers():
    assert get_policy("chunkkv").reuse == 2
    assert get_policy("chunkkv(reuse=3)").reuse == 3


def test_shotkv_has_a_keep_ratio_of_its_own_while_decoding():
    assert get_policy("shotkv").decode_ratio is None
    assert get_policy("shotkv(decode_ratio=0.5)").decode_ratio == 0.5


@pytest.mark.parametrize("name", ["adakv", "adapyramidkv", "fastgen"])
def test_only_some_policies_share_a_budget_between_heads(name):
    assert get_policy(name).shares_heads
    assert sum(get_policy(other).shares_heads for other in POLICIES) == 3


def test_lagkv_keeps_sinks_and_the_latest_of_a_prompt_too_short_for_two_runs():
    mask = get_policy("lagkv(sinks=4, lag=19)").keep(a_state(40), 0.5)
    assert mask.all(dim=0).nonzero().flatten().tolist() == [0, 1, 2, 3, *range(24, 40)]


def test_lagkv_gives_a_channel_that_never_changes_no_say():
    state = a_state(40)
    state = replace(state, keys=with_a_still_channel(state.keys))
    state = replace(state, values=with_a_still_channel(state.values))
    importance = get_policy("lagkv(sinks=2, lag=5)").importance(state)
    assert importance[:, 2:].isfinite().all()


def with_a_still_channel(held):
    return torch.cat([held, torch.full_like(held[..., :1], 3.0)], dim=-1)


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "chunkkv", "adakv", "criticalkv"])
def test_with_less_room_than_the_window_the_latest_of_it_stay(name):
    mask = get_policy(name).keep(a_state(40), 0.25)
    assert mask.all(dim=0).nonzero().flatten().tolist() == list(range(30, 40))
