"""Every policy against slow loops written from its paper's formulas."""

from dataclasses import replace

import pytest
import torch

from pytest_kvguard.policies import get_policy
from pytest_kvguard.specs import Spec
from tests.policies import oracles
from tests.strategies import a_state

LENGTHS = [1, 5, 6, 23, 40]
SHOTS = ((range(2, 7), range(20, 22)), (range(7, 15),), (range(16, 19),), (range(22, 33),))


def kept_by_oracle(oracle, state, n, **params):
    mask = torch.zeros(state.keys.shape[:2], dtype=torch.bool)
    for head in range(len(mask)):
        mask[head, oracle(state, head, n, **params)[:n]] = True
    return mask


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("knorm", {}),
        ("tova", {}),
        ("observed_attention", {}),
        ("streaming_llm", {}),
        ("streaming_llm", {"sinks": 0}),
        ("h2o", {}),
        ("h2o", {"heavy": 0.29}),
        ("h2o", {"heavy": 1.0}),
        ("h2o", {"heavy": 0.0}),
        ("snapkv", {}),
        ("snapkv", {"window": 4}),
        ("snapkv", {"window": 3, "kernel": 7, "pooling": "max"}),
        ("snapkv", {"window": 1, "kernel": 1}),
        ("chunkkv", {}),
        ("chunkkv", {"window": 4, "length": 5}),
        ("chunkkv", {"window": 2, "length": 1}),
        ("keydiff", {}),
        ("lagkv", {}),
        ("lagkv", {"sinks": 2, "lag": 5}),
        ("lagkv", {"sinks": 0, "lag": 4}),
        ("expected_attention", {"future": 7}),
        ("expected_attention", {"future": 1, "sinks": 0}),
        ("criticalkv", {"window": 4}),
        ("criticalkv", {"window": 1, "kernel": 1, "first": 0.0}),
        ("criticalkv", {"window": 3, "first": 0.29}),
        ("vatp", {"sinks": 2}),
        ("vatp", {"heavy": 0.29, "sinks": 0}),
        ("vatp", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("group", [1, 2, 4], ids="group of {}".format)
def test_a_policy_keeps_what_its_paper_says(name, params, group):
    policy = get_policy(Spec(name, params))
    oracle_params = {k: str(v) if k in {"heavy", "first"} else v for k, v in params.items()}
    for seed, length in enumerate(LENGTHS):
        protected = (length // 2,) if length > 5 else ()
        state = a_state(length, group=group, protected=protected, seed=seed)
        for ratio in (0.2, 0.5, 0.8):
            n = policy.budget(state, ratio)
            expected = kept_by_oracle(getattr(oracles, name), state, n, **oracle_params)
            assert torch.equal(policy.keep(state, ratio), expected), (length, ratio)


@pytest.mark.parametrize("rule", ["skip", "stop"])
@pytest.mark.parametrize("window", [1, 8, 64])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_shotkv_keeps_the_shots_its_paper_says(group, window, rule):
    policy = get_policy(f"shotkv(window={window}, rule={rule})")
    for seed in range(5):
        state = a_state(40, group=group, units=SHOTS, protected=(0, 8), seed=seed)
        for ratio in (0.3, 0.5, 0.7, 0.9):
            expected = torch.zeros(40, dtype=torch.bool)
            n = policy.budget(state, ratio)
            expected[sorted(oracles.kept_shots(state, n, window, rule))] = True
            assert torch.equal(policy.keep(state, ratio), expected.expand(2, -1)), (seed, ratio)


def test_pyramidkv_ranks_like_snapkv_and_budgets_like_a_pyramid():
    policy = get_policy("pyramidkv(window=4, beta=5)")
    for layer, budget in [(0, 4 + 17), (1, 4 + 9), (2, 4 + 1)]:  # 17 = 2 * 9 - 9 // 5
        state = a_state(60, layer=layer, layers=3, seed=layer)
        expected = kept_by_oracle(oracles.snapkv, state, budget, window=4)
        assert torch.equal(policy.keep(state, 13 / 60), expected)


@pytest.mark.parametrize(
    ("params", "oracle_params"),
    [
        ("window=4", {"window": 4}),
        ("window=1, kernel=1, floor=0.0", {"window": 1, "kernel": 1, "floor": "0.0"}),
        ("window=4, floor=0.29", {"window": 4, "floor": "0.29"}),
        ("window=3, floor=1.0", {"window": 3, "floor": "1.0"}),
    ],
)
@pytest.mark.parametrize("group", [1, 2], ids="group of {}".format)
def test_adakv_lets_the_heads_compete_for_what_the_floor_leaves(group, params, oracle_params):
    policy = get_policy(f"adakv({params})")
    uneven = set()
    for seed, length in enumerate(LENGTHS):
        state = a_state(length, heads=3, group=group, protected=(length // 2,), seed=seed)
        for ratio in (0.2, 0.5, 0.8):
            n = policy.budget(state, ratio)
            expected = oracles.adakv(state, n, **oracle_params)
            mask = policy.keep(state, ratio)
            assert [set(row.nonzero().flatten().tolist()) for row in mask] == expected
            assert int(mask.sum()) == 3 * n
            uneven.add(len(set(mask.sum(dim=-1).tolist())) > 1)
    assert any(uneven) or "floor=1.0" in params


def test_adapyramidkv_has_the_budgets_of_a_pyramid_and_heads_that_compete():
    policy = get_policy("adapyramidkv(window=4, beta=5)")
    for layer, budget in [(0, 4 + 17), (1, 4 + 9), (2, 4 + 1)]:  # 17 = 2 * 9 - 9 // 5
        state = a_state(60, layer=layer, layers=3, seed=layer)
        expected = oracles.adakv(state, budget, window=4)
        mask = policy.keep(state, 13 / 60)
        assert [set(row.nonzero().flatten().tolist()) for row in mask] == expected


def test_criticalkv_ranks_what_is_not_attended_to_by_its_effect_on_the_output():
    policy = get_policy("criticalkv(window=2, first=0.0)")
    state = a_state(40, seed=3)
    peaked = replace(state, keys=state.keys * 40)  # next to nothing for most positions
    for ratio in (0.2, 0.5, 0.8):
        n = policy.budget(peaked, ratio)
        expected = kept_by_oracle(oracles.criticalkv, peaked, n, window=2, first="0")
        assert torch.equal(policy.keep(peaked, ratio), expected), ratio


FASTGEN = [
    {},
    {"window": 4},
    {"window": 100},
    {"threshold": 0.5, "window": 100},
    {"threshold": 0.2, "frequent": 0.5, "local": 0.1},
    {"threshold": 0.5, "frequent": 0.2, "local": 0.8, "window": 1},
]


@pytest.mark.parametrize("group", [1, 2], ids="group of {}".format)
def test_fastgen_gives_each_head_the_cheapest_set_that_recovers_enough(group):
    taken = set()
    for seed, params in enumerate(FASTGEN):
        policy = get_policy(Spec("fastgen", params))
        for special in [(0,), (), (0, 1, 30)]:
            state = a_state(40, heads=4, group=group, protected=(5,), special=special, seed=seed)
            for ratio in (0.05, 0.2, 0.5, 0.8, 1.0):
                n = policy.budget(state, ratio)
                expected, choices = oracles.fastgen(state, n, **params)
                mask = policy.keep(state, ratio)
                assert [set(row.nonzero().flatten().tolist()) for row in mask] == expected
                taken |= set(choices)
    assert taken == {0, 1, 2, 3, 4}, "a set that no head ever took was not tested"
