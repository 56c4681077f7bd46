"""What modifiers promise, under every policy they go with."""

from dataclasses import replace
from fractions import Fraction
from itertools import cycle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_kvguard.engine.select import importances, keep_masks
from pytest_kvguard.errors import InvalidArgument, Refused
from pytest_kvguard.harness.encode import PROTECTABLE
from pytest_kvguard.laws import check_policy
from pytest_kvguard.policies import POLICIES, get_policy
from pytest_kvguard.policies.base import Passage
from pytest_kvguard.policies.budgets import fair_shares
from pytest_kvguard.policies.modifiers import MODIFIERS
from pytest_kvguard.policies.required import KINDS
from tests.strategies import a_state

UNITS = [name for name, make in POLICIES.items() if make().keeps_units]
TOKENS = [name for name in POLICIES if name not in (*UNITS, "quest")]  # which holds everything
CHAINS = (
    "fair",
    "fair|boundary(share=0.2)|reuse",
    "whitelist(kinds='system shot', last=2)|rerotated",
)


@pytest.mark.parametrize(("base", "modifiers"), list(zip(TOKENS, cycle(CHAINS), strict=False)))
def test_a_modified_policy_obeys_every_law(base, modifiers):
    check_policy(get_policy(f"{base}|{modifiers}"), max_examples=4)


@pytest.mark.parametrize("base", UNITS)
def test_a_modified_policy_that_keeps_units_obeys_every_law(base):
    check_policy(get_policy(f"{base}|whitelist(kinds=document)|boundary|reuse"), max_examples=8)


@pytest.mark.parametrize(
    ("planted", "law"),
    [
        (replace(get_policy("knorm|boundary(share=0.4)"), stays=None), "refused only when the bu"),
        (replace(get_policy("knorm"), stays=lambda state: state.protected | True), "protected sta"),
    ],
)
def test_a_whitelist_that_is_not_declared_or_not_kept_breaks_a_law(planted, law):
    with pytest.raises(AssertionError, match=f"law '{law}"):
        check_policy(planted)


def passages(*parts):
    """Return passages from kinds and lengths."""
    found, at = [], 0
    for kind, length in parts:
        found.append(Passage(kind, range(at, at + length)))
        at += length
    return tuple(found)


PROMPT = passages(("template", 2), ("system", 5), ("document", 20), ("question", 3))


def kept(spec, ratio, **state):
    mask = get_policy(spec).keep(replace(a_state(30), passages=PROMPT, **state), ratio)
    return [row.nonzero().flatten().tolist() for row in mask]


def test_required_parts_stay_and_are_charged():
    for head in kept("knorm|whitelist(kinds=system)", 0.5):
        assert {2, 3, 4, 5, 6} <= set(head)
        assert len(head) == 15
    for head in kept("knorm|whitelist(kinds='question template')", 0.5):
        assert {0, 1, 27, 28, 29} <= set(head)


def test_required_positions_count_from_either_end():
    for head in kept("knorm|whitelist(first=3, last=1)", 0.2):
        assert {0, 1, 2, 29} < set(head)
    assert kept("knorm|whitelist(first=6)", 0.2) == [list(range(6))] * 2
    assert kept("knorm|whitelist(last=6)", 0.2) == [list(range(24, 30))] * 2


def test_a_whitelist_adds_to_what_is_protected_and_to_other_whitelists():
    protected = torch.arange(30) == 10
    spec = "knorm|whitelist(kinds=system)|boundary(share=0.04)"
    for head in kept(spec, 8 / 30, protected=protected):
        assert head == [0, 2, 3, 4, 5, 6, 10, 29]
    with pytest.raises(Refused, match=r"is 7, but 8 are protected; the smallest .* 0.267"):
        kept(spec, 7 / 30, protected=protected)


def test_without_such_a_part_nothing_is_required():
    assert kept("knorm|whitelist(kinds=instruction)", 0.5) == kept("knorm", 0.5)


def test_units_are_whole_but_for_what_a_whitelist_keeps_of_them():
    units = ((range(0, 10),), (range(10, 20),), (range(20, 30),))
    first, second = kept("shotkv|boundary(share=0.1)", 0.5, units=units)
    assert first == second
    assert {0, 1, 2, 27, 28, 29} <= set(first)
    assert len(first) == 13  # one unit costs 7 positions more, the middle one 10


def test_the_boundary_is_a_share_of_the_prompt_at_both_ends():
    assert kept("knorm|boundary(share=0.2)", 12 / 30) == [[*range(6), *range(24, 30)]] * 2
    with pytest.raises(Refused, match=r"is 5, but 6 are protected; the smallest .* 0.2$"):
        kept("knorm|boundary", 5 / 30)


def test_the_kinds_of_a_whitelist_are_those_of_a_prompt():
    assert sorted(KINDS) == sorted(PROTECTABLE)


def brute_force(importance, n, sizes):
    """Split by Hamilton's method in exact fractions, then take the best of each part."""
    exact = [Fraction(n * size, sum(sizes)) for size in sizes]
    shares = [int(e) for e in exact]
    while sum(shares) < n:
        behind = [e - s for e, s in zip(exact, shares, strict=True)]
        shares[behind.index(max(behind))] += 1
    chosen, at = [], 0
    for size, share in zip(sizes, shares, strict=True):
        ranked = sorted(range(at, at + size), key=lambda i: (-float(importance[i]), i))
        chosen += sorted(ranked[:share])
        at += size
    return chosen


@pytest.mark.parametrize("base", ["knorm", "snapkv(window=4)", "streaming_llm", "random_tokens"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 11, 15, 22, 29, 30])
def test_a_fair_split_is_the_best_of_each_part_by_its_share(base, n):
    state = replace(a_state(30), passages=PROMPT)
    importance = get_policy(base).importance(state)
    expected = [brute_force(row, n, [7, 20, 3]) for row in importance]
    assert kept(f"{base}|fair", n / 30) == expected


def test_the_papers_two_spans_are_ours_to_one_token():
    """Floor for the earlier span, the rest for the later: arXiv 2510.00231, its own code."""
    for length, earlier, n in [(10, 3, 5), (57, 20, 31), (64, 1, 7), (33, 32, 30)]:
        theirs = n * earlier // length
        ours, later = fair_shares(n, [earlier, length - earlier], [0, 0])
        assert ours + later == n
        assert ours in (theirs, theirs + 1)


def test_what_is_protected_is_charged_to_its_part():
    protected = torch.zeros(30, dtype=torch.bool)
    protected[10:16] = True  # of the document, whose share of 15 is 10
    assert fair_shares(15, [7, 20, 3], [0, 6, 0]) == [4, 10, 1]
    for head in kept("knorm|fair", 0.5, protected=protected):
        assert [sum(at < 7 for at in head), sum(7 <= at < 27 for at in head)] == [4, 10]
        assert set(range(10, 16)) <= set(head)


def test_a_part_that_needs_more_than_its_share_takes_it_from_the_others():
    assert fair_shares(15, [7, 20, 3], [0, 14, 0]) == [1, 14, 0]
    assert fair_shares(10, [10, 10, 10], [8, 0, 0]) == [8, 1, 1]
    assert fair_shares(10, [10, 10, 10], [4, 5, 0]) == [4, 5, 1]
    assert fair_shares(3, [1, 1, 1, 1], [0, 0, 0, 0]) == [1, 1, 1, 0]


@given(st.data())
def test_fair_shares_add_up_hold_the_least_and_stay_within_one_of_a_common_rate(data):
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    least = [data.draw(st.integers(0, size)) for size in sizes]
    n = data.draw(st.integers(sum(least), sum(sizes)))
    shares = fair_shares(n, sizes, least)
    assert sum(shares) == n
    assert all(low <= share <= size for low, share, size in zip(least, shares, sizes, strict=True))
    free = [i for i in range(len(sizes)) if shares[i] > least[i]]
    for one in free:  # nobody could take a token from another and be further behind than it
        for other in range(len(sizes)):
            assert Fraction(shares[one] - 1, sizes[one]) < Fraction(shares[other] + 1, sizes[other])


def test_the_template_belongs_to_the_part_before_it():
    chat = passages(
        ("template", 4), ("system", 6), ("template", 10), ("question", 8), ("template", 2)
    )
    mask = get_policy("knorm|fair").keep(replace(a_state(30), passages=chat), 0.5)
    assert mask[:, :20].sum(-1).tolist() == mask[:, 20:].sum(-1).add(5).tolist() == [10, 10]


def test_a_prompt_of_one_part_is_split_no_further():
    whole = replace(a_state(30), passages=passages(("template", 30)))
    for state in (a_state(30), whole):
        assert torch.equal(
            get_policy("knorm|fair").keep(state, 0.5), get_policy("knorm").keep(state, 0.5)
        )


def states(layers):
    return [a_state(40, layer=i, layers=layers, seed=i) for i in range(layers)]


def all_kept(spec, layers=5, ratio=0.3):
    policy, seen = get_policy(spec), states(layers)
    return policy, keep_masks(policy, importances(policy, seen), seen, ratio)


def test_neighbours_share_the_selection_of_the_first():
    _, masks = all_kept("knorm|reuse(layers=3)")
    _, own = all_kept("knorm")
    assert [torch.equal(masks[i], own[i]) for i in range(5)] == [True, False, False, True, False]
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[3], masks[4])


def test_neighbours_whose_budgets_differ_get_the_smallest():
    base = get_policy("pyramidkv(window=2, beta=4)")
    policy, masks = all_kept("pyramidkv(window=2, beta=4)|reuse(layers=2)")
    own = [base.budget(state, 0.3) for state in states(5)]
    assert len(set(own)) == 5
    smallest = [own[1], own[1], own[3], own[3], own[4]]
    assert [policy.budget(state, 0.3) for state in states(5)] == smallest
    assert [int(mask.sum(-1).max()) for mask in masks] == smallest


def test_a_policy_that_reuses_a_selection_beyond_the_next_layers_budget_is_stopped():
    careless = replace(get_policy("pyramidkv(window=2, beta=4)"), reuse=2)
    seen = states(4)
    with pytest.raises(InvalidArgument, match="layer 1: kept 20 positions, the budget is 14"):
        keep_masks(careless, importances(careless, seen), seen, 0.3)


def test_a_modified_policy_says_so_by_its_name_and_parameters():
    policy = get_policy("snapkv(window=4)|fair|boundary(share=0.2)|reuse")
    assert policy.name == "snapkv|fair|boundary|reuse"
    assert policy.params == {
        "window": 4, "kernel": 5, "pooling": "avg", "boundary_share": 0.2, "reuse_layers": 2,
    }  # fmt: skip
    assert get_policy("tova|rerotated").rerotate
    assert get_policy("tova|rerotated").decode is not None


def test_the_registry_lists_what_is_told_here():
    assert {"boundary", "fair", "rerotated", "reuse", "whitelist"} <= set(MODIFIERS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shotkv|fair", "shotkv keeps whole units and fair gives .* such as snapkv[|]fair"),
        ("snapkv|boundary|fair", "snapkv[|]boundary: .* write fair first, as in snapkv[|]fair"),
        ("snapkv|fair|fair", "snapkv[|]fair is modified by fair already; leave one out"),
        ("snapkv|whitelist", "an empty whitelist requires nothing; name kinds of parts, as in"),
        ("snapkv|whitelist(kinds=shots)", "kinds must be one of system, .*; got 'shots'"),
        ("snapkv|whitelist(first=-1)", "first must be a whole number of at least 0, got -1"),
        ("snapkv|whitelist(last=1.5)", "last must be a whole number of at least 0, got 1.5"),
        ("snapkv|boundary(share=0.6)", r"share must be in \[0, 0.5\], for it .*; got 0.6"),
        ("snapkv|reuse(layers=0)", "layers must be a whole number of at least 1, got 0"),
        ("quest|fair", "quest holds everything, so fair has nothing to keep; use fair with a"),
        ("quest|boundary", "quest holds everything, so boundary has nothing to keep"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_way_out(spec, message):
    with pytest.raises(InvalidArgument, match=message):
        get_policy(spec)


def test_a_parameter_that_policy_and_modifier_share_is_refused_by_name():
    theirs = replace(get_policy("snapkv"), params={"bits": 3})
    with pytest.raises(InvalidArgument, match="snapkv and kivi both have a parameter 'bits'"):
        MODIFIERS["kivi"](bits=4)(theirs)
