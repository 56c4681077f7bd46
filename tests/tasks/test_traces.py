"""Where a reply's reasoning ends and its answer begins, and where that ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kvguard.tasks.traces import TAGS, opened_by, split_traces
from pytest_kvguard.tasks.turns import cut_at_stop, turns

TEXT = st.text("ab<>/ \n[]|", max_size=12).filter(
    lambda text: not any(tag in text for pair in TAGS for tag in pair)
)
PAIRS = st.sampled_from(TAGS)


@pytest.mark.parametrize(
    ("reply", "tail", "trace", "answer", "is_open"),
    [
        ("18", "A:", "", "18", False),
        (" 18\n", "A:", "", " 18\n", False),
        ("<think>\n9 * 2\n</think>\n\n18", "", "\n9 * 2\n", "18", False),
        ("9 * 2</think>18", "<think>\n", "9 * 2", "18", False),
        ("9 * 2</think>18", "", "9 * 2", "18", False),  # opened where nobody saw it
        ("9 * 2", "<think>\n", "9 * 2", "", True),
        ("<think>9 * 2", "", "9 * 2", "", True),
        ("18", "<think>\n\n</think>\n\n", "", "18", False),  # thinking is switched off
        ("18", "Write <think> before you think.\nA:", "", "18", False),
        ("<think></think>18", "", "", "18", False),
        ("<think>a</think>18<think>b</think>, no: 20", "", "ab", "18, no: 20", False),
        ("<think>a</think>18<think>b", "", "ab", "", True),
        ("<think>a<think>b</think>18", "", "a<think>b", "18", False),
        ("a</think>b</think>18", "<think>", "ab", "18", False),
        ("[THINK]a</think>b[/THINK]18", "", "a</think>b", "18", False),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>18",
         "<|start|>assistant", "a<|end|><|start|>assistant", "18", False),
        ("", "<think>", "", "", True),
    ],
)  # fmt: skip
def test_a_reply_is_split_into_trace_and_answer(reply, tail, trace, answer, is_open):
    assert split_traces(reply, tail) == (trace, answer, is_open)


@given(PAIRS, TEXT, TEXT)
def test_a_trace_and_an_answer_are_told_apart_again(pair, trace, answer):
    opening, closing = pair
    wanted = (trace, answer.lstrip(), False)
    assert split_traces(f"{opening}{trace}{closing}{answer}") == wanted
    assert split_traces(f"{trace}{closing}{answer}", f"Q: ...\nA: {opening}\n") == wanted


@given(PAIRS, TEXT, TEXT)
def test_a_trace_that_is_not_closed_holds_no_answer(pair, before, trace):
    assert split_traces(f"{before}{pair[0]}{trace}") == (trace, "", True)


@given(TEXT)
def test_a_reply_without_tags_is_all_answer(text):
    assert split_traces(text) == ("", text, False)


@given(st.text() | TEXT, st.text())
def test_an_answer_holds_no_trace(text, tail):
    answer = split_traces(text, tail).answer
    assert split_traces(answer) == ("", answer, False)


def test_a_prompt_opens_a_trace_only_with_its_last_words():
    assert opened_by("<|Assistant|><think>\n") == "</think>"
    assert opened_by("<think>\n\n</think>\n\n") is None
    assert opened_by("Think between <think> and </think>. A:") is None
    assert opened_by("") is None


@pytest.mark.parametrize(
    ("text", "strings", "left"),
    [
        ("18\n\nQ: 5", ("Q:",), "18\n\n"),
        ("18\n\nQ: 5", ("Q:", "\n\n"), "18"),
        ("18", ("Q:",), "18"),
        ("18", (), "18"),
        ("Q: 18", ("Q:",), ""),
        ("", ("Q:",), ""),
    ],
)
def test_a_text_is_cut_at_the_first_stop_string(text, strings, left):
    assert cut_at_stop(text, strings) == left


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("18\nQ: 5?\nA: 6", "18\n"),
        ("18\nQuestion 2: 5?", "18\n"),
        ("18\n**Question:** 5?", "18\n"),
        ("18\n\n### Problem 2\n5", "18\n\n"),
        ("18\nHuman: 5?", "18\n"),
        ("18\n<|im_start|>user\n5", "18\n"),
        ("18 [INST] 5", "18 [INST] 5"),
        ("18\n[INST] 5", "18\n"),
        ("18\nQuestion_9: 5?", "18\n"),
        ("Question: 5?\nA: 18", "Question: 5?\nA: 18"),
        ("The question: 5 or 6?", "The question: 5 or 6?"),
        ("It is\nQuestionable: 5", "It is\nQuestionable: 5"),
        ("18\nFAQ: 5", "18\nFAQ: 5"),
        ("", ""),
    ],
)
def test_a_turn_ends_where_the_next_question_begins(text, first):
    assert turns(text)[0] == first


@given(st.lists(st.sampled_from(["18", "\n", "Q: ", "Question 1:", "### Problem", " ", "A:"])))
def test_turns_lose_nothing(pieces):
    assert "".join(turns("".join(pieces))) == "".join(pieces)
