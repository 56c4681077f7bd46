"""Promises of the scorers, most of them traps that published scorers have fallen into."""

import doctest
from fractions import Fraction
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.tasks import (
    final_letter,
    final_number,
    markup,
    numerals,
    scorers,
    statements,
    traces,
    turns,
)
from pytest_kvguard.tasks.base import Sample
from pytest_kvguard.tasks.numerals import numbers
from pytest_kvguard.tasks.scorers import (
    answers_by_number,
    contains_all,
    exact,
    last_number,
    multiple_choice,
    numbered_answers,
)

EVERY = [contains_all, exact, last_number, multiple_choice, numbered_answers]


def wants(*target):
    return Sample("s", (), target=target)


@pytest.mark.parametrize(
    "module",
    [final_letter, final_number, markup, numerals, scorers, statements, traces, turns],
    ids=lambda module: module.__name__.rpartition(".")[2],
)
def test_the_examples_in_the_docstrings_are_true(module):
    found = doctest.testmod(module)
    assert found.failed == 0
    assert found.attempted > 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,450", ["1450"]),
        ("1,234,567.50", ["2469135/2"]),
        ("one, 2, 3 and 4,5", ["2", "3", "4", "5"]),
        ("1,4500", ["1", "4500"]),
        ("18.00", ["18"]),
        ("18.", ["18"]),
        ("so it is ...18", ["18"]),
        (".5 and -.5", ["1/2", "-1/2"]),
        ("$18 -$3 $-4 €5 US$6", ["18", "-3", "-4", "5", "6"]),
        ("25% of 80", ["25", "80"]),
        ("-3, \N{MINUS SIGN}4, (-5)", ["-3", "-4", "-5"]),
        ("10-12 and (2)-1 and x-7", ["10", "12", "2", "1", "7"]),
        ("20 - 3=17", ["20", "3", "17"]),
        ("**18** \\boxed{19} <20>", ["18", "19", "20"]),
        ("H2O x2 5kg 3rd", ["5", "3"]),
        ("3/4 and 6/0", ["3/4", "6", "0"]),
        ("1.2.3", ["6/5"]),
        ("1\u202f450 and 1\N{NO-BREAK SPACE}450.5, but 1 450", ["1450", "2901/2", "1", "450"]),
        ("\N{EN DASH}7 and 3\N{EN DASH}7", ["-7", "3", "7"]),
        ("2 1/2, 10 3/2, -1 1/2, 1.5 1/2", ["5/2", "10", "3/2", "-3/2", "3/2", "1/2"]),
        (r"\$1{,}450 1\,450 1,\!450 25\%", ["1450", "1450", "1450", "25"]),
        (r"\frac{3}{4} -\frac{1}{2} \dfrac34 2\frac{1}{2} \frac{x}{2}",
         ["3/4", "-1/2", "3/4", "5/2", "2"]),
        (r"\text{18 apples} \(19\) \[20\] $21$", ["18", "19", "20", "21"]),
        ("2**3**2 and **4**", ["2", "3", "2", "4"]),
        ("none", []),
        ("", []),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text, found):
    assert [str(number) for number in numbers(text)] == found


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.booleans())
def test_a_number_written_with_or_without_commas_is_the_same(value, commas):
    written = f"{value:,f}" if commas else f"{value:f}"
    assert numbers(f"It is {written}.") == (Fraction(value),)


def test_numbers_are_compared_exactly_and_not_as_floats():
    assert last_number("0.1000000000000000055511151231257827", wants("0.1")) == 0
    assert last_number("9007199254740993", wants("9007199254740992")) == 0
    assert last_number("$1,450.00", wants("1450")) == last_number("1450", wants("1,450")) == 1


def test_a_model_that_never_stops_writing_digits_is_wrong_and_no_error():
    endless = "1" * 6000  # more than int() converts
    assert last_number(endless, wants("1")) == 0
    assert contains_all(endless, wants("11111")) == 0
    assert answers_by_number(f"Answer_{endless}: The answer is 5.") == {}


def test_the_last_number_counts_where_nothing_is_stated_and_none_is_wrong():
    assert last_number("9 eggs, no: 7. So 18.", wants("18")) == 1
    assert last_number("9 eggs, no: 7. So 18. Or 19.", wants("18")) == 0
    assert last_number("The answer is", wants("18")) == 0
    assert last_number("The answer is -18", wants("18")) == 0


@pytest.mark.parametrize(
    "completion",
    ["B", " B\n", "B. Paris", "B) Paris", "(B)", "**B**", "B: as A is wrong", "B, of course",
     "The answer is B.", "I think the answer is (B), not A.", "Answer: B",
     "The correct option is B", "The answer is A? No. The answer is **B**."],
)  # fmt: skip
def test_a_letter_is_read_where_the_model_chooses_it(completion):
    assert multiple_choice(completion, wants("B")) == 1


@pytest.mark.parametrize(
    "completion",
    ["", "A", "b", "Because", "A good answer is hard to find", "BC", "A or B",
     "The answer is Bonn.", "I do not know", "The answer is B's opposite",
     "The answer is B. The answer is C."],
)  # fmt: skip
def test_no_letter_is_read_into_other_text(completion):
    assert multiple_choice(completion, wants("B")) == 0


def test_a_value_inside_a_longer_number_does_not_count():
    assert contains_all("12345", wants("12345")) == 1
    for longer in ["123456", "912345", "12345.6", "0.12345", "x12345", "912,345", "-12345"]:
        assert contains_all(longer, wants("12345")) == 0, longer


def test_the_share_of_the_values_found_is_the_mark():
    assert contains_all(
        "12345,67890 and 11111.", wants("12345", "67890", "22222")
    ) == pytest.approx(2 / 3)
    assert contains_all("The KEY, in an Amber box", wants("amber", "key", "ox", "box")) == 0.75


def test_exact_compares_all_of_the_completion():
    assert exact("  Saint Lucia\n", wants("Saint Lucia")) == 1
    assert exact("St. Lucia", wants("Saint Lucia", "St. Lucia")) == 1
    assert exact("saint lucia", wants("Saint Lucia")) == exact("Saint Lucia!", wants("x")) == 0


def test_answers_are_matched_by_their_number_and_not_by_their_place():
    swapped = "Answer_2: The answer is 20.\nAnswer_1: The answer is 10."
    assert numbered_answers(swapped, wants("10", "20")) == 1
    assert numbered_answers(swapped, wants("20", "10")) == 0


def test_a_missing_answer_shifts_no_other_and_still_counts_as_asked():
    gap = "Answer_1: The answer is 10. Answer_3: The answer is 30. Answer_9: The answer is 90."
    assert numbered_answers(gap, wants("10", "20", "30", "40")) == 0.5
    assert numbered_answers("", wants("10", "20")) == 0


def test_an_answer_given_twice_is_wrong_even_if_both_are_right():
    assert (
        numbered_answers("Answer_1: The answer is 7. Answer_1: The answer is 7.", wants("7")) == 0
    )


def test_an_answer_cut_off_does_not_borrow_the_next_number():
    cut = "Answer_1: 4 + 6 = 10 apples. Answer_2: 5 * 2 = 10. The answer is 10."
    assert answers_by_number(cut) == {2: Fraction(10)}
    assert answers_by_number("Answer_1: The answer is unknown. Answer_2: The answer is") == {}


def test_answers_keep_their_sign_and_all_their_digits():
    text = "Answer_1: The answer is $-1,234.50.\n**Answer_2:** So the answer is: **18.00**"
    assert answers_by_number(text) == {1: Fraction(-2469, 2), 2: Fraction(18)}


def test_what_follows_the_answer_is_no_answer():
    text = "Answer_1: The answer is 4, no: the answer is 5 of the 6 eggs."
    assert answers_by_number(text) == {1: Fraction(5)}


def test_a_mention_of_an_answer_is_no_answer():
    text = "Answer_1: The answer is 5. Answer_2: Twice Answer_1 is 10. The answer is 10."
    assert answers_by_number(text) == {1: Fraction(5), 2: Fraction(10)}


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("Answer_1: 9 + 9 = 18\n#### 18\nAnswer_2: so \\boxed{20}.", {1: 18, 2: 20}),
        ("**Answer 1:** The answer is **18** (9 a day).\nAnswer_2: 7", {1: 18}),
        ("Answer_1: The answer is 18 or 19. Answer_2: The answer is 9 + 9 = 18.", {2: 18}),
        ("Answer_1: The answer is 18.\n\nQuestion: More?\nThe answer is 7.", {1: 18}),
        ("Answer_1:\nQuestion: how many?\nThe answer is 18.", {1: 18}),
        ("<think>Answer_1: The answer is 7.</think>Answer_1: The answer is 18.", {1: 18}),
        ("<think>Answer_1: The answer is 18.", {}),
        ("Answer_1: The answer is not 18.", {}),
        ("Answer_1: The answer is 18. Check: 5 + 4. Answer_2: 18", {1: 18}),
    ],
)  # fmt: skip
def test_an_answer_counts_only_where_it_is_stated(text, given):
    assert answers_by_number(text) == given


@pytest.mark.parametrize("scorer", EVERY, ids=lambda scorer: scorer.__name__)
def test_what_is_only_in_a_reasoning_trace_never_counts(scorer):
    target = "B" if scorer is multiple_choice else "18"
    right = "Answer_1: The answer is 18." if scorer is numbered_answers else target
    assert scorer(right, wants(target)) == 1
    assert scorer(f"<think>or 5, or C</think>\n\n{right}", wants(target)) == 1
    for wrong in (
        f"<think>{right}</think>", f"{right}</think> 5", f"<think>{right}",
        f"<think>5</think><think>{right}</think>C",
    ):  # fmt: skip
        assert scorer(wrong, wants(target)) == 0, wrong


@pytest.mark.parametrize("scorer", EVERY, ids=lambda scorer: scorer.__name__)
@pytest.mark.parametrize(
    "piece",
    ["1", " ", "The answer is ", "\\boxed{", "####", "**", "A. ", "18 or ", "= 1 ", "<think>"],
)
def test_a_reply_that_goes_on_and_on_is_marked_in_no_time(scorer, piece):
    began = process_time()
    scorer(piece * 20_000, wants("18"))
    assert process_time() - began < 5  # a pattern that backtracks takes hours


def test_questions_may_be_numbered_from_any_number():
    assert numbered_answers("Answer_9: The answer is 5.", wants("5", "6"), first=9) == 0.5
    assert numbered_answers("Answer_1: The answer is 5.", wants("5", "6"), first=9) == 0


@pytest.mark.parametrize("scorer", EVERY, ids=lambda scorer: scorer.__name__)
@given(completion=st.text() | st.text("0123456789.,-/$%Answer_is:() \n"))
def test_every_mark_lies_between_0_and_1(scorer, completion):
    assert 0 <= scorer(completion, wants("12", "3")) <= 1


@pytest.mark.parametrize("scorer", EVERY, ids=lambda scorer: scorer.__name__)
def test_a_sample_without_a_target_is_refused(scorer):
    with pytest.raises(InvalidArgument, match="sample 's' has no target"):
        scorer("18", wants())


def test_a_target_that_must_be_a_number_and_is_none_is_refused():
    with pytest.raises(InvalidArgument, match="target 'eighteen' must be one number"):
        last_number("18", wants("eighteen"))
