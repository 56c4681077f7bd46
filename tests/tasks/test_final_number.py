"""The number a reply answers with: replies that tempt a scorer, with the mark they deserve."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kvguard.tasks.final_number import final_number, stated_numbers

STATED = [
    "The answer is 18.",
    "The answer is 18 (in 2023).",
    "The answer is 18. Let me check: 9 * 2. Step 3.",
    "The answer is 18. Or 19.",
    "The answer is 7. Wait, no. The answer is 18, not 20.",
    "The answer is 7? No. The answer is 18.",
    "The answer is not 7. So: answer: 18",
    "The answer is 18. If the answer is 20, then 2 are missing.",
    "The answer is 18. Suppose that the answer was 20: 2 too many.",
    "The answer is 9 + 9 = 18 (since 3 * 3 = 9).",
    "The answer is 9 * 2 = 10 + 8 = 18 eggs.",
    "The answer is the sum of 9 and 9, which is 18.",
    "The answer is 18, which is 2 more than 16.",
    "The answer is x = 18.",
    "The answer is 18 of the 24 eggs.",
    "The answer is 18 - that is, 9 for each of the 2.",
    "The answer is 18, 9 for each day.",
    "The answer is 18, as 3 of 6 are left.",
    "The answer is:\n\n18\n\nIn 2023 it was 20.",
    "The answer to the question of 4 ducks is 18. There are 4 ducks.",
    "The final answer would be **18**. 3 steps.",
    "**Answer:** 18\n\nConfidence: 95",
    "ANSWER: 18\n1. Check 9 * 2.",
    "## Final Answer\n18\n\nTotal steps: 3",
    "<answer> 18 </answer> 3 tokens",
    "~~19~~ 18",
    "The answer is ~~19~~ 18.",
    "It takes 2 days.\n#### 18",
    "9 * 2 = 18\n#### 18\nStep 3: done. The answer is 7.",
    "#### 1. Count the eggs\n#### 2. Sell them\nThe answer is 18.",
    "#### Step 1: 9 eggs\nThe answer is 18",
    "#### 18 eggs (in 2023)",
    "#### $18.00.",
    "##### 5\nThe answer is 18.",
    r"So \boxed{18}. Let me check: 9 * 2, step 3.",
    r"\boxed{7}, no, \boxed{18}. The answer is 9.",
    r"Put it in \boxed{}: \boxed{18 \text{ eggs}}",
    r"\boxed{\text{18}} eggs, 3 a day",
    r"\boxed{x = 18}, 3",
    r"\[ \boxed{ \$18.00 } \] and 5",
    r"The answer is $\boxed{18}$. I hope it is correct. 5",
    r"The answer is \(18\). (3)",
    r"The answer is \frac{36}{2}. So 2",
    "The answer is 36/2, half of 36.",
    "The answer is \N{DOLLAR SIGN}18.00 for 2.",
    "The answer is 18%. Not 0.18.",
    "The answer is 18 km/h, for 2 h.",
    "The answer is 18\N{DEGREE SIGN}C at 7:30.",
    "The answer is 18m^2, for 2 rooms.",
    "9 * 2 = 18\n\nQ: How many in 5 days?\nA: The answer is 45.",
    "The answer is 18.\n\nQuestion: And 5 ducks?\nAnswer: The answer is 7.",
    "18\n\n### Problem 2\n\\boxed{7}",
    "18 eggs\n<|im_start|>user\nAnd 5?",
    "Question: how many are 9 * 2?\nAnswer: 18",
    "Let me see.\nQuestion: how many?\nThe answer is 18.",
    "so she makes 18",
    "I cannot say what the answer is. Maybe 18",
]  # fmt: skip

NOT_18 = [
    "The answer is 180.",
    "The answer is 1.8.",
    "The answer is 18,000.",
    "The answer is -18.",
    "The answer is \N{MINUS SIGN}18.",
    "The answer is 18/2.",
    "The answer is 18 or 19.",
    "The answer is 18 eggs or 19 eggs.",
    "The answer is 18 and 20.",
    "The answer is 18 dollars and 50 cents.",
    "The answer is 18, 19.",
    "The answer is 18 to 20.",
    "The answer is 18-20.",
    "The answer is 18 + 2.",
    "The answer is 18 * 2.",
    "The answer is 18 + 2 = 20.",
    r"The answer is 18 \times 10^3.",
    "The answer is 18:30.",
    "The answer is 18^2.",
    "The answer is not 18. It is 20.",
    "9 + 9 = 18. The answer is 20.",
    "The answer is 18. Wait, the answer is 20.",
    "The answer is 20. Not 18",
    r"18 \boxed{18, 19}",
    r"The answer is 18, so \boxed{20}.",
    r"So \boxed{18",
    "The answer is 18.\n#### 20",
    "#### 20\nThe answer is 18",
    "2 * 10 = 20\n\nQ: What is 9 * 2?\nA: The answer is 18.",
    "20\n\nUser: and 9 * 2?\nAssistant: 18",
    "The answer is H18.",
    "eighteen",
    "",
]  # fmt: skip


@pytest.mark.parametrize("reply", STATED)
def test_the_number_that_is_answered_is_found(reply):
    assert final_number(reply) == 18


@pytest.mark.parametrize("reply", NOT_18)
def test_no_other_number_is_taken_for_the_answer(reply):
    assert final_number(reply) != 18


@pytest.mark.parametrize(
    ("reply", "stated"),
    [
        ("9 eggs", []),
        ("The answer is 18 or 19.", [None]),
        ("The answer is 7. The answer is 18.", [7, 18]),
        (r"The answer is 7, so \boxed{18}", [18]),
        ("The answer is unknown. There are 5.", []),
    ],
)
def test_what_is_stated_is_told_from_what_is_only_there(reply, stated):
    assert stated_numbers(reply) == stated


STATEMENTS = st.sampled_from(
    ["The answer is {}.", "Answer: {}", "So the final answer is **{}**!", "#### {}",
     r"\boxed{{{}}}", r"Hence $\boxed{{{}}}$.", r"The answer is \({}\).", "<answer>{}</answer>",
     "The answer is: {} apples.", "The answer would be {}, of course."]
)  # fmt: skip
BEFORE = st.sampled_from(["", "2 * 3 = 6. ", "1. First, 4 of 5.\n", "We have 7 (or 8). "])
AFTER = st.sampled_from(["", "\nLet me check: 3 + 4.", "\n\nQ: And 5?\nA: 6", "\n(In 2023.)"])
VALUES = st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-1e9, max_value=1e9)


@given(st.data(), VALUES, BEFORE, STATEMENTS, AFTER)
def test_what_is_stated_is_read_back(data, value, before, statement, after):
    sign, digits = ("-" if value < 0 else ""), abs(value)
    minus = data.draw(st.sampled_from(["-", "\N{MINUS SIGN}"])) if sign else ""
    written = data.draw(
        st.sampled_from([
            f"{minus}{digits:f}", f"{minus}{digits:,f}", f"{minus}${digits:,f}",
            f"{minus}\\${digits:f}", f"{minus}{digits:f}%",
            f"{minus}{digits:,f}".replace(",", "{,}"),
        ])
    )  # fmt: skip
    assert final_number(before + statement.format(written) + after) == Fraction(value)


@given(st.integers(1, 999), st.integers(2, 999), BEFORE, STATEMENTS, AFTER)
def test_a_fraction_that_is_stated_is_read_back(above, below, before, statement, after):
    for written in (f"{above}/{below}", rf"\frac{{{above}}}{{{below}}}"):
        assert final_number(before + statement.format(written) + after) == Fraction(above, below)


@given(st.integers(0, 99), st.integers(1, 8), BEFORE, STATEMENTS, AFTER)
def test_a_mixed_number_that_is_stated_is_read_back(whole, ninths, before, statement, after):
    for written in (f"{whole} {ninths}/9", rf"{whole}\frac{{{ninths}}}{{9}}"):
        found = final_number(before + statement.format(written) + after)
        assert found == whole + Fraction(ninths, 9)
