"""Decode phases behind another prefill, in lockstep with loops over sets of positions."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from pytest_kvguard.engine.grid import Cell
from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import EMPTY, DecodeState
from pytest_kvguard.policies.combine import combined
from pytest_kvguard.policies.evict import victims
from tests.strategies import a_state

HEADS, GROUP, STEPS = 2, 2, 32
UNITS = tuple((range(at, at + 4),) for at in range(0, 20, 4))


class Step:
    """What one head holds when its newest token has been attended, as sets and dicts."""

    def __init__(self, held, newest, prompt, sums, own, shared):
        self.held, self.newest, self.prompt = held, newest, prompt
        self.sums = sums  # position -> what it got from all queries
        self.own = own  # position -> what the head's query heads pay to it now
        self.shared = shared  # position -> what the heads that hold it pay to it now, the mean

    @property
    def generated(self):
        """How many tokens were generated so far."""
        return self.newest + 1 - self.prompt


def least(positions, value):
    return min(positions, key=lambda at: (value(at), -at))


def h2o(step, among, room):
    recent = room - room // 2
    return [at for at in among if at <= step.newest + 1 - recent], lambda at: step.sums[at]


def tova(step, among, room):
    return among, lambda at: step.shared[at]


def streaming_llm(step, among, room):
    return [at for at in among if at >= min(4, room - 2)], lambda at: at


def rolling(rule) -> Callable:
    """Over all that is held, within the budget once the next token has come."""

    def frees(step, budget, ratio):
        room = max(2, budget)
        old, value = rule(step, step.held - {step.newest}, room)
        return [least(old, value)] if len(step.held) > room - 1 and old else []

    return frees


def frozen(rule) -> Callable:
    """Over generated tokens, within their share once the next one has come."""

    def frees(step, budget, ratio):
        ours = {at for at in step.held if at >= step.prompt}
        room = max(2, math.floor(ratio * (step.generated + 1)))
        old, value = rule(step, ours - {step.newest}, room)
        return [least(old, value)] if len(ours) > room - 1 and old else []

    return frees


def shotkv(step, budget, ratio):
    ours = {at for at in step.held if at >= step.prompt}
    old = ours - {step.newest}
    over = len(ours) - max(1, math.floor(ratio * step.generated))
    return [least(old, lambda at: step.shared[at])] if over > 0 and old else []


def scope(limit) -> Callable:
    """Down to ``limit(generated)`` tokens, the last 3 among them; None: nothing goes now."""

    def frees(step, budget, ratio):
        ours = {at for at in step.held if at >= step.prompt}
        old = sorted(
            (at for at in ours if at <= step.newest - 3), key=lambda at: (step.own[at], -at)
        )
        most = limit(step.generated)
        return [] if most is None else old[: max(0, len(ours) - most)]

    return frees


def growing(generated):
    return min(8, 3 + generated // 4)


CASES = {
    "snapkv(window=4)+h2o": rolling(h2o),
    "snapkv(window=4)+tova": rolling(tova),
    "pyramidkv(window=4)+streaming_llm": rolling(streaming_llm),
    "snapkv(window=4)+h2o@0.3": frozen(h2o),
    "snapkv(window=4)+h2o@0.9": frozen(h2o),
    "snapkv(window=4)+tova@0.5": frozen(tova),
    "snapkv(window=4)+streaming_llm@0.25": frozen(streaming_llm),
    "shotkv(window=4)+h2o": frozen(h2o),
    "shotkv(window=4)+h2o@0.25": frozen(h2o),
    "shotkv(window=4)+tova": frozen(tova),
    "random_shots+streaming_llm": frozen(streaming_llm),
    "snapkv(window=4)+shotkv": shotkv,
    "snapkv(window=4)+shotkv@0.2": shotkv,
    "scope(window=8, recent=3)": scope(lambda generated: 8),
    "shotkv(window=4)+scope(window=8, recent=3)": scope(lambda generated: 8),
    "scope(window=3, recent=3)": scope(lambda generated: 3),
    "scope(strategy=adaptive, window=8, recent=3, every=4)": scope(growing),
    "h2o+scope(strategy=discontinuous, window=8, recent=3, every=4)": scope(
        lambda generated: growing(generated) if generated % 4 == 0 else None
    ),
}


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("ratio", ["0.4", "0.75"])
def test_a_decode_phase_behind_another_prefill_frees_what_the_loop_frees(spec, ratio):
    for seed in range(2):
        Lockstep(spec, Fraction(ratio), seed).run(CASES[spec])


class Lockstep:
    """One row, decoded by a policy and by a loop; slots are filled in no particular order."""

    def __init__(self, spec, ratio, seed):
        self.policy, self.ratio = get_policy(spec), ratio
        self.draw = torch.Generator().manual_seed(seed)
        state = a_state(22, protected=(21,), units=UNITS, seed=seed)
        self.length = state.length
        self.budget = self.policy.budget(state, float(ratio))
        self.decode_ratio = Fraction(str(Cell(self.policy, float(ratio)).decode_ratio))
        slots = self.policy.decode.slots(self.budget, STEPS + 1, float(self.decode_ratio))
        self.positions = torch.full((1, HEADS, slots), EMPTY)
        self.sums = torch.zeros(1, HEADS, slots)
        self.held = [set() for _ in range(HEADS)]
        self.totals = [dict.fromkeys(range(self.length + STEPS), 0.0) for _ in range(HEADS)]
        paid = state.attention_sums.view(HEADS, GROUP, -1).sum(1)
        for head, mask in enumerate(self.policy.keep(state, float(ratio))):
            for position in mask.nonzero().flatten().tolist():
                self.put(head, position, float(paid[head, position]))

    def put(self, head, position, total=0.0):
        free = (self.positions[0, head] == EMPTY).nonzero().flatten().tolist()
        assert free, "there is no slot left for the next token"
        slot = free[int(torch.randint(len(free), (1,), generator=self.draw))]
        self.positions[0, head, slot] = position
        self.sums[0, head, slot] = self.totals[head][position] = total
        self.held[head].add(position)

    def run(self, frees):
        freed = 0
        for newest in range(self.length - 1, self.length + STEPS - 1):
            if newest >= self.length:
                for head in range(HEADS):
                    self.put(head, newest)
            own = self.attend(newest)
            expected = [frees(step, self.budget, self.decode_ratio) for step in self.steps(own)]
            before = [set(held) for held in self.held]
            self.evict(newest)
            for head in range(HEADS):
                now = set(self.positions[0, head].tolist()) - {EMPTY}
                assert now == before[head] - set(expected[head]), f"after {newest}, head {head}"
                self.held[head] = now
                freed += len(expected[head])
        assert freed > 4, "hardly anything was freed, so nothing was tried"

    def attend(self, newest):
        """Let the newest token look at what is held: for each query head, position -> weight."""
        self.newest = newest
        logits = torch.randn(HEADS * GROUP, self.length + STEPS, generator=self.draw).double()
        paid = []
        for query, row in enumerate(logits.tolist()):
            held = self.held[query // GROUP]
            total = math.fsum(math.exp(row[at]) for at in held)
            paid.append({at: math.exp(row[at]) / total for at in held})
        self.weights = torch.zeros(1, HEADS * GROUP, self.positions.shape[-1])
        for query, row in enumerate(paid):
            for slot, at in enumerate(self.positions[0, query // GROUP].tolist()):
                if at != EMPTY:
                    self.weights[0, query, slot] = row[at]
                    self.sums[0, query // GROUP, slot] += row[at]
                    self.totals[query // GROUP][at] += row[at]
        return paid

    def steps(self, paid):
        shared = {}
        for at in set().union(*self.held):
            votes = [row[at] for row in paid if at in row]
            shared[at] = math.fsum(votes) / len(votes)
        for head in range(HEADS):
            rows = paid[head * GROUP : (head + 1) * GROUP]
            own = {at: math.fsum(row[at] for row in rows) for at in self.held[head]}
            yield Step(self.held[head], self.newest, self.length, self.totals[head], own, shared)

    def evict(self, newest):
        for _ in range(self.policy.decode.burst):
            state = DecodeState(
                weights=self.weights,
                sums=self.sums,
                positions=self.positions,
                newest=torch.tensor([newest]),
                prompt_length=torch.tensor([self.length]),
                budget=torch.tensor([self.budget]),
                ratio=torch.tensor([float(self.decode_ratio)], dtype=torch.float64),
            )
            slots = victims(self.policy.decode, state)[0]
            for head, slot in enumerate(slots.tolist()):
                if slot != -1:
                    self.positions[0, head, slot] = EMPTY


@pytest.mark.parametrize("spec", ["shotkv+h2o", "snapkv+h2o@0.5", "random_shots+tova", "scope"])
def test_a_frozen_prompt_is_the_one_the_prefill_kept(spec):
    ratio = Fraction("0.75")
    row = Lockstep(spec, ratio, seed=1)
    prompt = [set(held) for held in row.held]
    for newest in range(row.length, row.length + STEPS):
        for head in range(HEADS):
            row.put(head, newest)
        row.attend(newest)
        row.evict(newest)
        now = [set(head) - {EMPTY} for head in row.positions[0].tolist()]
        row.held = now
        assert [{at for at in held if at < row.length} for held in now] == prompt


def test_the_prefill_comes_from_one_policy_and_the_decode_phase_from_the_other():
    snapkv, heavy = get_policy("snapkv"), get_policy("h2o")
    both = combined(snapkv, heavy)
    state = a_state(40, units=UNITS)
    assert torch.equal(both.keep(state, 0.5), snapkv.keep(state, 0.5))
    assert (both.window, both.keeps_units, both.reuse) == (32, False, 1)
    assert both.decode is heavy.decode
    assert both.needs_sums
    assert not get_policy("snapkv+tova").needs_sums
    assert get_policy("h2o+tova").needs_sums
    assert get_policy("snapkv+streaming_llm(positions=cache)").rerotate


def test_both_sets_of_parameters_are_kept():
    both = get_policy("shotkv(window=8)+h2o(heavy=0.25)@0.5")
    assert both.name == "shotkv+h2o"
    assert dict(both.params) == {
        "window": 8,
        "rule": "skip",
        "decode_heavy": 0.25,
        "decode_ratio": 0.5,
    }


@pytest.mark.parametrize(
    ("spec", "ratio"),
    [
        ("snapkv+h2o", 0.3),
        ("snapkv+h2o@0.5", 0.5),
        ("snapkv+shotkv(decode_ratio=0.2)", 0.2),
        ("snapkv+shotkv(decode_ratio=0.2)@0.6", 0.6),
        ("shotkv(decode_ratio=0.2)", 0.2),
    ],
)
def test_the_ratio_while_decoding_is_the_one_behind_the_at_sign_or_the_cells(spec, ratio):
    assert Cell(get_policy(spec), 0.3).decode_ratio == ratio


def test_a_prefill_whose_heads_share_the_budget_is_frozen():
    """Heads hold different numbers, and a budget alike for all would let the smaller ones grow."""
    unequal = replace(get_policy("knorm"), shares_heads=True)
    both = combined(unequal, get_policy("h2o"))
    state = DecodeState(
        weights=torch.rand(1, 2, 6),
        sums=torch.rand(1, 2, 6),
        positions=torch.tensor([[[0, 1, 2, 5, 6, EMPTY], [3, 5, 6, EMPTY, EMPTY, EMPTY]]]),
        newest=torch.tensor([6]),
        prompt_length=torch.tensor([4]),
        budget=torch.tensor([2]),
        ratio=torch.tensor([0.5], dtype=torch.float64),
    )
    assert victims(both.decode, state).tolist() == [[3, 1]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("snapkv+knorm", "knorm keeps every generated token, so there is nothing to combine"),
        ("shotkv(decode_ratio=0.5)+h2o", r"write shotkv\+h2o@0.5"),
        ("shotkv+h2o@0", r"keep ratio must be in \(0, 1\], got 0.0"),
        ("shotkv+h2o@1.5", r"keep ratio must be in \(0, 1\], got 1.5"),
        ("shotkv+scope@0.5", "scope holds a number of generated tokens that no ratio changes"),
        ("scope(window=8)", "window must hold the recent tokens too, so at least 16; got 8"),
        ("scope(strategy=slow)", "strategy must be one of slide, adaptive, discontinuous"),
        ("scope(every=0)", "every must be a whole number of at least 1, got 0"),
        ("scope(recent=0)", "recent must be a whole number of at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_together_is_refused(spec, message):
    with pytest.raises(InvalidArgument, match=message):
        get_policy(spec)
