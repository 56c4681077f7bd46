"""How replies end, and what of them is marked: with words for tokens, one for each."""

from random import Random
from types import SimpleNamespace

import pytest

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.harness.replies import (
    LOOK_EVERY,
    Reply,
    Stopping,
    decode_with_tags,
    stopping,
)
from pytest_kvguard.repetition import LEAST
from pytest_kvguard.tasks.base import Part, Sample, Task

EOS = 0
WORDS = ["<eos>", "<think>", "</think>", "Q:", "\n", "18", " eggs", "5", " so", "\n\n"]
THINK, CLOSE, NEXT, LINE, RIGHT, EGGS, FIVE, SO, GAP = range(1, 10)


def words(tokens):
    return "".join(WORDS[token] for token in tokens if token != EOS)


def until(*strings, most=1000, prompt_tail="A:"):
    return Stopping(most, frozenset({EOS}), strings, words, prompt_tail)


def read(stop, tokens):
    """Read a reply, token by token as an engine does; return it with the tokens it got."""
    written = []
    for token in tokens:
        written.append(token)
        if stop.over(written):
            break
    return stop.read(written), len(written)


def test_a_reply_ends_with_its_end_token_or_before_a_stop_string():
    assert read(until("Q:"), [RIGHT, EGGS, EOS]) == (Reply("18 eggs", "", "ended"), 3)
    assert read(until("Q:"), [RIGHT, LINE, NEXT, FIVE]) == (Reply("18\n", "", "ended"), 3)
    assert read(until(), [RIGHT, NEXT, FIVE, EOS]) == (Reply("18Q:5", "", "ended"), 4)


def test_a_reply_that_does_not_end_is_truncated():
    assert read(until("Q:", most=2), [RIGHT, EGGS, EOS]) == (Reply("18 eggs", "", "truncated"), 2)


@pytest.mark.parametrize("opened", [True, False])
def test_a_stop_string_inside_a_trace_ends_nothing(opened):
    stop = until("Q:", "\n\n", prompt_tail="A: <think>\n" if opened else "A:")
    trace = [FIVE, NEXT, GAP, FIVE, *[SO] * 20, GAP]
    start = trace if opened else [THINK, *trace]
    reply, taken = read(stop, [*start, CLOSE, GAP, RIGHT, GAP, FIVE, EOS])
    assert reply == Reply("18", words(trace), "ended")
    assert taken == len(start) + 4


def test_the_gap_behind_a_trace_is_no_stop_string():
    stop = until("\n\n", "\n")
    assert read(stop, [THINK, SO, CLOSE, GAP, RIGHT, LINE])[0] == Reply("18", " so", "ended")


@pytest.mark.parametrize("last", [EOS, SO])
def test_a_trace_that_never_closes_is_truncated_and_answers_nothing(last):
    reply, _ = read(until("Q:", most=3), [THINK, RIGHT, last])
    assert (reply.answer, reply.ending) == ("", "truncated")
    assert reply.trace.startswith("18")


def test_a_reply_that_loops_is_cut_off_and_keeps_what_it_said():
    reply, taken = read(until(), [RIGHT, EGGS, *[SO, LINE] * 500])
    assert reply.ending == "looped"
    assert reply.answer.startswith("18 eggs so")
    assert LEAST <= taken <= LEAST + 2 + LOOK_EVERY


def test_a_trace_that_loops_is_looped_and_answers_nothing():
    reply, taken = read(until(), [THINK, *[SO, LINE] * 500])
    assert (reply.answer, reply.ending) == ("", "looped")
    assert taken < 500


def test_a_loop_that_is_cut_off_at_the_most_tokens_is_a_loop():
    assert read(until(most=LEAST + 1), [SO, LINE] * 500)[0].ending == "looped"


def test_whether_a_reply_is_over_hangs_on_its_tokens_alone():
    tokens = [RIGHT, *[SO, LINE] * 500]
    stop = until("Q:")
    _, taken = read(stop, tokens)
    assert [stop.over(tokens[:n]) for n in range(1, taken + 1)] == [False] * (taken - 1) + [True]


def test_a_stop_string_is_found_across_tokens_and_after_half_a_letter():
    pieces = {
        1: "a",
        2: "\N{REPLACEMENT CHARACTER}",
        3: "\N{REPLACEMENT CHARACTER}",
        4: "Q",
        5: ":",
    }

    def bytes_to_text(tokens):
        """Two halves of a letter come out as one letter, one alone as a question mark."""
        half = pieces[2]
        return "".join(pieces[token] for token in tokens).replace(half + half, "\u00e9")

    stop = Stopping(9, frozenset({EOS}), ("Q:", "\u00e9"), bytes_to_text)
    assert [stop.ended([1, 4, 5][:n]) for n in (1, 2, 3)] == [False, False, True]
    assert [stop.ended([1, 2, 3][:n]) for n in (1, 2, 3)] == [False, False, True]
    assert stop.text([1, 2, 3]) == "a"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InvalidArgument, match=r"a stop string must not be empty, got \('Q:', ''\)"):
        until("Q:", "")


def test_a_long_trace_full_of_stop_strings_is_decoded_no_more_often_than_they_come():
    long = []

    def decode(tokens):
        long.append(len(tokens) > 16)
        return words(tokens)

    stop = Stopping(10_000, frozenset({EOS}), ("\n\n",), decode, "<think>")
    rng = Random(0)
    text = [rng.choice([FIVE, RIGHT, EGGS, SO]) if i % 20 else GAP for i in range(2000)]
    assert not any(stop.over(text[:n]) for n in range(1, 2001))
    assert sum(long) == text.count(GAP) - 1  # the first comes before there is anything long


TASK = Task(
    "t", "a", (Sample("s", (Part("question", "?"),), ("18",)),), lambda text, sample: 1.0, 8,
    stop=("Q:",),
)  # fmt: skip


def test_the_prompts_say_whether_replies_begin_inside_a_trace():
    made = stopping(TASK, [[FIVE, THINK, LINE]] * 2, None, frozenset({EOS}), words)
    assert (made.most, made.eos, made.strings) == (8, {EOS}, ("Q:",))
    assert made.read([RIGHT, CLOSE, FIVE, EOS]) == Reply("5", "18", "ended")
    closed = stopping(TASK, [[THINK, CLOSE, GAP]], None, frozenset({EOS}), words)
    assert closed.read([RIGHT, EOS]) == Reply("18", "", "ended")


def test_prompts_of_which_only_some_open_a_trace_are_refused():
    with pytest.raises(InvalidArgument, match="task 't': some prompts open a reasoning trace"):
        stopping(TASK, [[FIVE, THINK], [FIVE]], None, frozenset(), words)


def test_tags_are_written_even_where_they_are_special_tokens():
    special = {THINK, CLOSE, EOS}

    def skipping(tokens):
        return words([token for token in tokens if token not in special])

    added = {
        number: SimpleNamespace(content=WORDS[number], special=number in special)
        for number in (EOS, THINK, CLOSE, NEXT)
    }
    readable = decode_with_tags(SimpleNamespace(added_tokens_decoder=added), skipping)
    assert readable([THINK, FIVE, SO, CLOSE, RIGHT, EOS]) == "<think>5 so</think>18"
    assert decode_with_tags(object(), skipping) is skipping
