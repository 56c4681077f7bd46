"""Loops are found, and what only looks like one is not."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pytest_kvguard.repetition import LEAST, ROUNDS, TAIL, loops
from pytest_kvguard.tasks.procedural.long_answers import draw_list
from tests.test_reasoner import REASONER

TABLE = "| item | price | number |\n|---|---|---|\n" + "".join(
    f"| apple {i} | {3 * i}.00 | 0 |\n" for i in range(60)
)
CODE = "".join(f"    assert cells[{i}].verdict == 'pass'\n" for i in range(60))
ANSWERS = "".join(f"Answer_{i}: 2 * {i} = {2 * i}. The answer is {2 * i}.\n" for i in range(1, 60))
COUNTING = " ".join(str(i) for i in range(400))
GOOGOL = f"The answer is 1{100 * '0'}."
THIRD = f"1 / 3 = 0.{200 * '3'}"
RULE = 80 * "-" + "\n" + 80 * "=" + "\n" + 80 * "-" + "\n"
MATRIX = "[" + "], [".join(", ".join(str(int(i == j)) for j in range(24)) for i in range(24)) + "]"
THRICE = 3 * "".join(f"Line {i} of what was to be said three times.\n" for i in range(9))
YES = "".join(f"{i}. yes\n" for i in range(200))
LEGITIMATE = [TABLE, CODE, ANSWERS, COUNTING, GOOGOL, THIRD, RULE, MATRIX, THRICE, YES]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=TAIL // ROUNDS),
    st.lists(st.integers(10, 99), max_size=50),
    st.integers(0, 50),
)
def test_a_loop_is_found_whatever_its_period_and_whatever_came_before(period, before, more):
    rounds = max(ROUNDS, -(-LEAST // len(period)))
    tokens = period * (rounds + 1)
    assert loops([*before, *tokens[: rounds * len(period) + more % len(period)]])


@given(st.lists(st.integers(0, 3), max_size=2000))
def test_a_loop_is_what_repeats_for_so_many_rounds_and_tokens(tokens):
    def repeats(period):
        long = max(LEAST, ROUNDS * period)
        tail = tokens[-long:]
        return len(tail) == long and tail[period:] == tail[:-period]

    assert loops(tokens) == any(repeats(period) for period in range(1, TAIL // ROUNDS + 1))


@pytest.mark.parametrize("period", [1, 2, 37, 64, 65, 512])
def test_a_loop_is_cut_off_as_soon_as_it_is_one_and_no_sooner(period):
    tokens = [0, *(list(range(1, period + 1)) * (TAIL + 1))]
    long = max(LEAST, ROUNDS * period)
    assert not loops(tokens[:long])  # the first token is another
    assert loops(tokens[: long + 1])


def test_a_period_longer_than_can_be_seen_is_no_loop():
    assert loops(list(range(512)) * 5)
    assert not loops(list(range(513)) * 5)


@pytest.mark.parametrize("text", LEGITIMATE, ids=lambda text: text[:12])
def test_answers_that_repeat_themselves_for_good_reason_are_no_loops(text):
    for tokens in (list(text.encode()), [hash(word) for word in text.split()]):
        assert not any(loops(tokens[:length]) for length in range(1, len(tokens) + 1, 7))


def test_what_a_perfect_model_writes_is_no_loop():
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    for seed in range(5):
        tokens = tokenizer(draw_list(random.Random(seed), 12, 16).answer).input_ids
        assert len(tokens) > LEAST
        assert not any(loops(tokens[:length]) for length in range(1, len(tokens) + 1))


def test_a_loop_that_was_left_is_none():
    assert loops([1, 2] * 300)
    assert not loops([*([1, 2] * 300), 3])


def test_no_more_than_the_tail_is_looked_at():
    class Watched(list):
        def __getitem__(self, at):
            assert isinstance(at, slice)
            assert len(range(len(self))[at]) <= TAIL
            return super().__getitem__(at)

    assert not loops(Watched(range(10 * TAIL)))
