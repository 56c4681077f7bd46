"""Every policy obeys the laws, and a policy that breaks one is told which."""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase

from pytest_kvguard import laws
from pytest_kvguard.errors import Refused
from pytest_kvguard.laws import LAWS, check_policy
from pytest_kvguard.policies import POLICIES, evict, get_policy
from pytest_kvguard.policies.base import EMPTY, Policy
from pytest_kvguard.policies.evict import evictable, victims

KNORM, SHOTS, TOVA = get_policy("knorm"), get_policy("shotkv"), get_policy("tova")


@pytest.mark.parametrize(
    "spec",
    [
        *POLICIES,
        "adakv(window=3, floor=0.0)",
        "adakv(window=3, kernel=3, floor=1.0)",
        "adapyramidkv(window=4, beta=3)",
        "chunkkv(window=3, length=4)",
        "criticalkv(window=3, first=0.0)",
        "criticalkv(window=3, first=1.0)",
        "expected_attention(future=3, sinks=0)",
        "fastgen(threshold=0.0)",
        "fastgen(threshold=1.0, frequent=1.0, local=1.0)",
        "fastgen(threshold=0.5, frequent=0.0, local=0.0, window=100)",
        "h2o(heavy=0.0)",
        "h2o(heavy=1.0)",
        "lagkv(sinks=0, lag=2)",
        "lagkv(sinks=3, lag=5)",
        "pyramidkv(window=4, beta=3)",
        "shotkv(rule=stop)",
        "snapkv(window=4, kernel=3, pooling=max)",
        "streaming_llm(sinks=0, positions=cache)",
        "vatp(heavy=1.0, sinks=2)",
        "vatp(heavy=0.0, sinks=0)",
        "scope(window=3, recent=2)",
        "scope(strategy=adaptive, window=4, recent=1, every=2)",
        "scope(strategy=discontinuous, window=4, recent=1, every=3)",
        "snapkv+tova",
        "snapkv+h2o@0.5",
        "shotkv+h2o",
        "random_shots+streaming_llm@0.3",
    ],
)
def test_every_policy_obeys_every_law(spec):
    check_policy(get_policy(spec), max_examples=50 if spec in POLICIES else 25)


def selecting(base: Policy, select) -> Policy:
    """The same policy with another selection, made from its mask."""

    def planted(importance, n, state):
        return select(base.select(importance, n, state), state)

    return replace(base, name="planted", select=planted)


def rating(importance) -> Policy:
    return replace(KNORM, name="planted", importance=importance)


def later_of_equals(importance, n, state):
    protected = torch.where(state.protected, float("inf"), importance)
    ranked = protected.flip(-1).argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(importance, dtype=torch.bool).scatter(-1, ranked[:, :n], True)
    return kept.flip(-1)


def ignoring_protected(importance, n, state):
    nothing = replace(state, protected=torch.zeros_like(state.protected))
    return KNORM.select(importance, n, nothing)


def splits_a_unit(mask, state):
    mask = mask.clone()
    for unit in state.units:
        mask[:, unit[-1].stop - 1] &= state.protected[unit[-1].stop - 1] or len(unit[-1]) == 1
    return mask


class RemembersThePromptBefore:
    """Its importance is that of the prompt it saw last time, as far as it goes."""

    def __init__(self):
        self.seen = None

    def __call__(self, state):
        mine = KNORM.importance(state)
        before, self.seen = self.seen, mine
        if before is None or before.shape != mine.shape:
            return mine
        return before


def changes_its_input(state):
    importance = KNORM.importance(state)
    state.keys[:] = 0
    return importance


def one_more(state, ratio):
    return min(state.length, KNORM.budget(state, ratio) + 1)


def refuses_short_prompts(state, ratio):
    if state.length < 8:
        raise Refused("too short")
    return KNORM.budget(state, ratio)


def empties_a_head(mask, state):
    return mask & (torch.arange(len(mask)) != len(mask) - 1)[:, None]


def sees_the_future(state):
    """The attention of the last queries without a causal mask."""
    keys = state.keys.repeat_interleave(len(state.queries) // len(state.keys), dim=0)
    logits = state.queries[:, -4:].float() @ keys.float().mT * state.scaling  # (Hq, W, T)
    return logits.softmax(dim=-1).unflatten(0, (len(state.keys), -1)).sum(dim=(1, 2))


def goes_by_every_query_there_is(state):
    """Its own window is 1, and the others are there when another policy asks for them."""
    return KNORM.importance(state) * state.queries.shape[1]


def evicting(base: Policy = TOVA, **changes) -> Policy:
    """The same policy with something else about how it evicts."""
    return replace(base, name="planted", decode=replace(base.decode, **changes))


class RemembersTheStepBefore:
    """It goes by how far the step it saw last time had come, where that is less."""

    def __init__(self):
        self.seen = None

    def __call__(self, state):
        mine = (state.newest - state.prompt_length) // 2
        if len(mine) == 1:  # one law lets rows decode alone; this is about another
            return mine
        before, self.seen = self.seen, mine
        return mine if before is None or before.shape != mine.shape else mine.minimum(before)


def empties_what_it_was_given(state):
    importance = TOVA.decode.importance(state)
    state.weights.zero_()
    return importance


def goes_by_slot(state):
    return torch.arange(state.positions.shape[-1]).float().expand(state.positions.shape)


FAULTS = {
    "units stay whole": selecting(SHOTS, splits_a_unit),
    "budgets within the ratio": replace(KNORM, budget=one_more),
    "kept <= budget": selecting(KNORM, lambda mask, state: mask | mask.roll(1, -1)),
    "same state, same selection": rating(RemembersThePromptBefore()),
    "of equals, the earlier": replace(KNORM, select=later_of_equals),
    "protected stay": replace(KNORM, select=ignoring_protected),
    "something stays": selecting(KNORM, empties_a_head),
    "input unchanged": rating(changes_its_input),
    "random state unchanged": rating(lambda state: torch.rand(state.keys.shape[:2])),
    "mask is (Hkv, T) bool": selecting(KNORM, lambda mask, state: mask[0]),
    "importance is (Hkv, T) float32, never nan": rating(lambda state: state.keys.norm(dim=-1) / 0),
    "refused only when the budget cannot hold what must stay": replace(
        KNORM, budget=refuses_short_prompts
    ),
    "what is gone stays gone": replace(KNORM, name="planted", narrows=True),
    "ratio 1 keeps all": selecting(
        KNORM, lambda mask, state: mask & ((torch.arange(state.length) != 5) | state.protected)
    ),
    "what other policies recorded changes nothing": rating(goes_by_every_query_there_is),
    "no query sees what comes after it": replace(rating(sees_the_future), window=4),
    "importance while decoding is (R, Hkv, C) float32, never nan": evicting(
        importance=lambda state: state.weights.mean(dim=1)
    ),
    "candidates are (R, Hkv, C) bool": evicting(candidates=lambda state: state.weights[:, :1] < 1),
    "allowed is (R,) or (R, Hkv), in whole numbers": evicting(
        allowed=lambda state: state.budget * state.ratio
    ),
    "slots have no order": evicting(importance=goes_by_slot),
    "free slots change nothing": evicting(
        SHOTS,
        allowed=lambda state: torch.full_like(state.newest, state.positions.shape[-1] - 5),
    ),
    "rows do not see each other": evicting(
        SHOTS,
        allowed=lambda state: state.budget.max().expand_as(state.budget) - 1,
    ),
    "a prompt of whole units stays": evicting(
        SHOTS,
        candidates=lambda state: state.generated | (state.positions == 0),
        allowed=lambda state: torch.zeros_like(state.newest),
    ),
    "step unchanged": evicting(importance=empties_what_it_was_given),
    "random state unchanged while decoding": evicting(
        importance=lambda state: torch.rand(state.positions.shape).sort()[0] + goes_by_slot(state)
    ),
    "same step, same choice": evicting(SHOTS, allowed=RemembersTheStepBefore()),
    "the next token has a slot": evicting(allowed=lambda state: TOVA.decode.allowed(state) + 1),
    "no more candidates than allowed": evicting(
        get_policy("scope(strategy=discontinuous, window=4, recent=1, every=3)"), burst=1
    ),
}
"""For each law a policy that breaks it."""


def frees_the_newest(eviction, state):
    return (state.positions == state.newest[:, None, None]).int().argmax(dim=-1)


def frees_what_is_protected(eviction, state):
    return victims(eviction, replace(state, protected=None))


def frees_free_slots(eviction, state):
    free = (state.positions == EMPTY).int()
    return torch.where(free.any(dim=-1), free.argmax(dim=-1), victims(eviction, state))


def frees_the_earliest_of_equals(eviction, state):
    turned = replace(state, positions=torch.where(state.held, 9999 - state.positions, EMPTY))
    plain = replace(
        eviction,
        importance=lambda _: eviction.importance(state),
        candidates=lambda _: evictable(eviction.candidates(state), state),
        allowed=lambda _: eviction.allowed(state),
    )
    return victims(plain, turned)


ENGINES = {
    "the newest token stays": frees_the_newest,
    "protected stay while decoding": frees_what_is_protected,
    "only held candidates go": frees_free_slots,
    "of candidates, the least important, of equals the latest": frees_the_earliest_of_equals,
}
"""For each law that `victims` keeps for every policy, one that breaks it."""


def test_there_is_a_fault_for_every_law():
    assert FAULTS.keys() | ENGINES.keys() == LAWS.keys()


@pytest.fixture
def unshrunk(monkeypatch):
    """The first state that breaks a law will do; the smallest takes most of the time."""
    monkeypatch.setattr(laws, "PHASES", (Phase.generate,))


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("law", FAULTS)
def test_a_broken_law_is_named_in_the_first_line(law):
    assert_named(law, FAULTS[law])


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("law", ENGINES)
def test_a_law_that_is_kept_for_every_policy_is_tried_all_the_same(law, monkeypatch):
    monkeypatch.setattr(evict, "victims", ENGINES[law])
    assert_named(law, TOVA)


def assert_named(law, policy):
    with pytest.raises(AssertionError) as broken:
        check_policy(policy)
    first = str(broken.value).splitlines()[0]
    assert first.startswith(f"law {law!r} broken: ")


@pytest.mark.parametrize("importance", ["keys", "values", "sums"])
def test_what_does_not_ask_queries_may_rate_every_position_by_every_other(importance):
    """As KeyDiff does, whose rating of a key depends on the mean of all keys."""

    def far_from_the_mean(state):
        looked_at = {
            "keys": lambda: state.keys,
            "values": lambda: state.values,
            "sums": lambda: state.attention_sums.unflatten(0, (len(state.keys), -1)).mT,
        }[importance]().float()
        return (looked_at - looked_at.mean(dim=1, keepdim=True)).norm(dim=-1)

    check_policy(replace(rating(far_from_the_mean), needs_sums=importance == "sums"))


def test_a_policy_that_answers_differently_each_time_is_told_so():
    generator = torch.Generator().manual_seed(0)
    fickle = rating(lambda state: torch.rand(state.keys.shape[:2], generator=generator))
    with pytest.raises(AssertionError, match="law 'same state, same selection' broken: planted"):
        check_policy(replace(fickle, name="planted"))


def test_what_a_policy_raises_by_itself_goes_through():
    def broken(state):
        raise ZeroDivisionError("in the policy")

    with pytest.raises(ZeroDivisionError, match="in the policy"):
        check_policy(rating(broken))
