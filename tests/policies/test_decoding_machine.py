"""Decoding with eviction, step by step, against a model made of sets of positions."""

from fractions import Fraction

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import EMPTY, DecodeState
from pytest_kvguard.policies.evict import victims
from tests.strategies import a_state

HEADS, GROUP, NEW = 2, 2, 24
SINKS = 3
RATIOS = [Fraction(1, 10), Fraction(3, 10), Fraction(1, 2), Fraction(9, 10)]
SPECS = [f"streaming_llm(sinks={SINKS})", "tova", "h2o", "shotkv"]


class Decoding(RuleBasedStateMachine):
    """Rows of two prompts; the last token of each is fed again, as answers are read."""

    @initialize(
        spec=st.sampled_from(SPECS),
        lengths=st.tuples(st.integers(2, 20), st.integers(2, 20)),
        ratios=st.tuples(st.sampled_from(RATIOS), st.sampled_from(RATIOS)),
        seed=st.integers(0, 999),
    )
    def prefill(self, spec, lengths, ratios, seed):
        self.policy, self.lengths, self.ratios = get_policy(spec), lengths, ratios
        self.generator = torch.Generator().manual_seed(seed)
        states = [
            a_state(length, protected=(length - 1,), units=((range(length - 1),),), seed=seed)
            for length in lengths
        ]
        pairs = list(zip(states, ratios, strict=True))
        self.budgets = [self.policy.budget(state, float(ratio)) for state, ratio in pairs]
        slots = max(self.policy.decode.slots(budget, NEW, 0.0) for budget in self.budgets)
        self.positions = torch.full((2, HEADS, slots), EMPTY)
        self.sums = torch.zeros(2, HEADS, slots)
        for row, (state, ratio) in enumerate(pairs):
            mask = self.policy.keep(state, float(ratio))
            for head in range(HEADS):
                kept = mask[head].nonzero().flatten()
                self.positions[row, head, : len(kept)] = kept
                sums = state.attention_sums.view(HEADS, GROUP, -1)[head].sum(0)
                self.sums[row, head, : len(kept)] = sums[kept]
        self.prompt = self.held()
        self.gone = [[set() for _ in range(HEADS)] for _ in range(2)]
        self.newest = torch.tensor(lengths) - 1
        self.attend()

    def held(self):
        return [
            [set(head) - {EMPTY} for head in heads] for heads in self.positions.tolist()
        ]  # [row][head]

    def attend(self):
        """Let the newest tokens look at everything held, then evict."""
        empty = self.positions == EMPTY
        logits = torch.randn(2, HEADS, GROUP, empty.shape[-1], generator=self.generator)
        logits = logits.masked_fill(empty.unsqueeze(2), -torch.inf)
        weights = logits.softmax(-1)
        self.sums = (self.sums + weights.sum(2)).masked_fill(empty, 0)
        state = DecodeState(
            weights=weights.flatten(1, 2),
            sums=self.sums,
            positions=self.positions,
            newest=self.newest,
            prompt_length=torch.tensor(self.lengths),
            budget=torch.tensor(self.budgets),
            ratio=torch.tensor([float(ratio) for ratio in self.ratios], dtype=torch.float64),
        )
        before = self.positions.clone()
        slots = victims(self.policy.decode, state)
        assert torch.equal(self.positions, before)
        for row in range(2):
            for head in range(HEADS):
                slot = int(slots[row, head])
                if slot != -1:
                    self.gone[row][head].add(int(self.positions[row, head, slot]))
                    self.positions[row, head, slot] = EMPTY

    @rule()
    def decode(self):
        if int(self.newest.max()) >= max(self.lengths) - 1 + NEW:
            return
        self.newest = self.newest + 1
        for row in range(2):
            for head in range(HEADS):
                free = (self.positions[row, head] == EMPTY).nonzero().flatten()
                assert len(free) > 0, "capacity is never exceeded"
                self.positions[row, head, free[-1]] = self.newest[row]
        self.attend()

    @invariant()
    def the_newest_token_is_held(self):
        for newest, heads in zip(self.newest.tolist(), self.held(), strict=True):
            assert all(newest in held for held in heads)

    @invariant()
    def what_was_evicted_never_returns(self):
        for gone, held in zip(self.gone, self.held(), strict=True):
            assert all(not g & h for g, h in zip(gone, held, strict=True))

    @invariant()
    def the_next_token_fits_the_budget(self):
        if self.policy.name == "shotkv":
            return
        for budget, heads in zip(self.budgets, self.held(), strict=True):
            assert all(len(held) <= max(1, budget - 1) for held in heads)

    @invariant()
    def shotkv_freezes_the_prompt_and_keeps_its_share_of_the_answer(self):
        if self.policy.name != "shotkv":
            return
        for row, heads in enumerate(self.held()):
            generated = int(self.newest[row]) - self.lengths[row] + 1
            share = max(1, int(self.ratios[row] * generated)) if generated else 0
            for head, held in enumerate(heads):
                assert {at for at in held if at < self.lengths[row]} == self.prompt[row][head]
                assert len(held) - len(self.prompt[row][head]) == share

    @invariant()
    def streaming_llm_holds_sinks_and_the_most_recent(self):
        if not self.policy.name.startswith("streaming"):
            return
        for row, heads in enumerate(self.held()):
            newest, room = int(self.newest[row]), max(self.budgets[row] - 1, 1)
            sinks = set(range(min(SINKS, room - 1)))
            recent = set(range(newest - room + 1 + len(sinks), newest + 1))
            assert all(held == sinks | recent for held in heads)

    @invariant()
    def h2o_holds_the_recent_half(self):
        if self.policy.name != "h2o":
            return
        for row, heads in enumerate(self.held()):
            newest, room = int(self.newest[row]), max(self.budgets[row], 2)
            recent = room - room // 2 - 1  # the next token will be one of them
            assert all(set(range(newest - recent + 1, newest + 1)) <= held for held in heads)

    @invariant()
    def tova_holds_the_same_in_every_head(self):
        if self.policy.name == "tova":
            assert all(first == second for first, second in self.held())


TestDecoding = Decoding.TestCase
TestDecoding.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
