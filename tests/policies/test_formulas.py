"""Every policy against slow loops written from its paper's formulas."""

from dataclasses import replace

import pytest
import torch

from pytest_kvguard.policies import POLICIES, get_policy
from pytest_kvguard.policies.quest import upper_bound
from pytest_kvguard.specs import Spec
from tests.policies import oracles
from tests.strategies import a_state

LENGTHS = [1, 5, 6, 23, 40]
LONG = 320
"""Longer than any window, lag, sinks or run that a policy has by default."""

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


DEFAULTS = [
    name for name in POLICIES if hasattr(oracles, name) and name not in {"adakv", "fastgen"}
]


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_policy_as_it_comes_keeps_what_its_paper_says_of_a_long_prompt(name):
    policy, state = get_policy(name), a_state(LONG, protected=(3, LONG - 1), seed=7)
    for ratio in (0.1, 0.5, 0.9):
        n = policy.budget(state, ratio)
        expected = kept_by_oracle(getattr(oracles, name), state, n)
        assert torch.equal(policy.keep(state, ratio), expected), ratio


def test_policies_whose_heads_compete_keep_what_their_papers_say_of_a_long_prompt():
    state = a_state(LONG, protected=(3, LONG - 1), seed=7)
    for ratio in (0.1, 0.5, 0.9):
        n = get_policy("adakv").budget(state, ratio)
        for name in ("adakv", "fastgen"):
            expected = getattr(oracles, name)(state, n)
            expected = expected[0] if name == "fastgen" else expected
            mask = get_policy(name).keep(state, ratio)
            assert [set(row.nonzero().flatten().tolist()) for row in mask] == expected, name


@pytest.mark.parametrize("layer", [0, 2])
def test_pyramids_as_they_come_keep_what_their_papers_say_of_a_long_prompt(layer):
    state = a_state(LONG, layer=layer, layers=3, seed=8)  # 80 of each on average, 32 the window
    n = {0: 32 + 2 * 48 - 48 // 20, 2: 32 + 48 // 20}[layer]
    expected = kept_by_oracle(oracles.snapkv, state, n)
    assert torch.equal(get_policy("pyramidkv").keep(state, 0.25), expected)
    mask = get_policy("adapyramidkv").keep(state, 0.25)
    assert [set(row.nonzero().flatten().tolist()) for row in mask] == oracles.adakv(state, n)


def test_shotkv_as_it_comes_keeps_what_its_paper_says_of_a_long_prompt():
    units = tuple((range(at, min(LONG - 5, at + 17)),) for at in range(4, LONG - 5, 17))
    state = a_state(LONG, units=units, protected=(3, LONG - 1), seed=9)
    for ratio in (0.1, 0.5, 0.9):
        expected = torch.zeros(LONG, dtype=torch.bool)
        n = get_policy("shotkv").budget(state, ratio)
        expected[sorted(oracles.kept_shots(state, n, 32, "skip"))] = True
        assert torch.equal(get_policy("shotkv").keep(state, ratio), expected.expand(2, -1)), ratio


def test_the_long_prompt_is_longer_than_every_default():
    for name, make in POLICIES.items():
        params = make().params
        sizes = [params.get(key, 0) for key in ("window", "sinks", "page", "length", "recent")]
        assert sum(sizes) + 2 * params.get("lag", 0) < LONG, name


@pytest.mark.parametrize("name", ["knorm", "keydiff", "tova", "snapkv(window=4, kernel=1)", "h2o"])
def test_of_equals_a_policy_keeps_the_earlier(name):
    """Positions come in pairs that are alike, as far as the policy looks at them."""
    state = a_state(40, seed=2)
    pairs = torch.arange(40) // 2 * 2
    alike = replace(
        state,
        keys=state.keys[:, pairs],
        values=state.values[:, pairs],
        attention_sums=state.attention_sums[:, pairs],
    )
    policy = get_policy(name)
    assert policy.budget(alike, 0.275) == 11
    for row in policy.keep(alike, 0.275)[:, :36]:
        assert (row[::2] | ~row[1::2]).all(), "the later of a pair stays without the earlier"


def test_of_equals_in_a_run_lagkv_keeps_the_earlier():
    state = a_state(24, seed=4)
    pairs = torch.arange(24) // 2 * 2
    alike = replace(state, keys=state.keys[:, pairs], values=state.values[:, pairs])
    policy = get_policy("lagkv(sinks=0, lag=8)")
    n = policy.budget(alike, 14 / 24)
    assert n == 14  # the last run, and of 16 that are rated the best three of either run
    expected = kept_by_oracle(oracles.lagkv, alike, n, sinks=0, lag=8)
    assert torch.equal(policy.keep(alike, 14 / 24), expected)


@pytest.mark.parametrize("group", [1, 2])
def test_quest_bounds_what_a_query_may_find_in_a_page(group):
    state = a_state(24, group=group, seed=5)
    pages = state.keys.unflatten(1, (6, 4))  # (Hkv, P, L, D)
    bounds = upper_bound(state.queries[None], pages.amin(2)[None], pages.amax(2)[None])[0]
    for head, queries in enumerate(state.queries.double().tolist()):
        held = pages[head // group].double().tolist()
        expected = [[oracles.page_bound(query, page) for page in held] for query in queries]
        torch.testing.assert_close(bounds[head], torch.tensor(expected))


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
