"""The letter a reply chooses: replies that tempt a scorer, with the mark they deserve."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kvguard.tasks.final_letter import final_letter

CHOOSES_B = [
    "B", " B\n", "B. Paris", "B) Paris", "(B)", "**B**", "B: as A is wrong", "B, of course",
    "$B$", "`B`", "[B]", "**B. Paris**",
    "The answer is B.", "I think the answer is (B), not A.", "Answer: B", "Answer:\nB",
    "**Answer:** B\n\nA would be wrong.", "ANSWER: B", "<answer>B</answer>",
    "The correct option is B", "The correct choice is option B.", "The answer is the letter B",
    "The answer is: $B$.", r"The answer is \(B\).", r"The answer is $\text{B}$",
    "The answer is A? No. The answer is **B**.",
    "The answer is not A. The answer is B, since A is wrong.",
    "The answer is A. Wait, A is too small. The answer is B.",
    "The answer is B. If the answer were C, it would be green. If the answer is D, blue.",
    "The answer is B, C is wrong.", "The answer is B (A is wrong).",
    "A. Paris is in France.\nB. Bonn is not.\nThe answer is B.",
    "Let me see:\nA. Paris - no.\nB. Bonn - yes.\nSo the answer is B.",
    "A is wrong, so B is correct.", "(B) is the right answer.", "I choose B.",
    "I would go with (B)", "Option B: Paris", "The answer is \u201cB\u201d.",
    "I, for one, believe the answer is B.", "I am sure: the answer is B because A is wrong.",
    r"\boxed{B}", r"So $\boxed{\text{B}}$. A is wrong.", r"\boxed{(B)}", r"\boxed{B. Paris}",
    r"\boxed{A}? No: \boxed{\textbf{(B)}}", r"A. Paris? The answer is C. \boxed{B}",
    r"Put it in \boxed{}: the answer is B", "Some steps.\n#### B",
    "A: B", "A: (B)",
    "B\n\nQuestion: And now?\nAnswer: C", "The answer is B.\n\nQ: And now?\nA: The answer is C.",
    "B\nWhich is green?\nA. x\nB. y\nC. z\nAnswer: C",
    "B. Paris\nWhich is green?\nA. x\nB. y\nAnswer: A",
    "The answer is vitamin. I choose B.",
]  # fmt: skip

DOES_NOT = [
    "", "A", "b", "Because", "A good answer is hard to find", "BC", "A or B", "B or A", "A and B",
    "The answer is Bonn.", "I do not know", "The answer is B's opposite",
    "The answer is B. The answer is C.", "The answer is A or B.", "The answer is B or C.",
    "The answer is (B) and (C).", "The answer is B, C.", "The answer is A/B.", "Is the answer B?",
    "The answer is B? No.", "The answer is not B.", "Option B is wrong, so the answer is C.",
    "Option B is wrong.", "If the answer is B, then C is too.", "The answer is B-flat.",
    "The answer is B.B. King.", "The answer is C++.", "The answer is B+.", "B+ trees are best",
    "B* search", "The answer is unknown", "Vitamin B is the best", "Plan B",
    r"\boxed{A} The answer is B.", r"\boxed{A, B}", r"\boxed{Bonn}", r"\boxed{B",
    "A\n\nQuestion: And now?\nAnswer: B", "A. Paris\nWhich is green?\nA. x\nB. y\nAnswer: B",
    "A: A", "#### A\nThe answer is B", "Both B and C", "B's", "B2",
]  # fmt: skip


@pytest.mark.parametrize("reply", CHOOSES_B)
def test_the_letter_is_read_where_the_model_chooses_it(reply):
    assert final_letter(reply) == "B"


@pytest.mark.parametrize("reply", DOES_NOT)
def test_no_letter_is_read_into_other_text(reply):
    assert final_letter(reply) != "B"


@pytest.mark.parametrize(
    "reply",
    ["A good answer is hard to find.", "The answer is A good one.", "I think so",
     "I choose A book.", "The answer is I think so"],
)  # fmt: skip
def test_an_article_and_a_speaker_are_no_letters(reply):
    assert final_letter(reply) is None


LETTERS = st.sampled_from("ABCDEFGHIJ")
CHOICES = st.sampled_from(
    ["{}", "({})", "{}.", "**{}**", "The answer is {}.", "The answer is ({}), as it says.",
     r"\boxed{{{}}}", r"$\boxed{{\text{{{}}}}}$", "Answer: **{}**", "I choose {}.",
     "The correct option is {}) Paris", "{} is correct.", "#### {}"]
)  # fmt: skip
AFTER = st.sampled_from(
    ["", "\n\nQ: And now?\nA: The answer is J.", "\nThat is because it says so."]
)


@given(LETTERS, CHOICES, AFTER)
def test_what_is_chosen_is_read_back(letter, choice, after):
    assert final_letter(choice.format(letter) + after) == letter


@given(LETTERS, LETTERS)
def test_of_two_answers_the_last_counts(first, last):
    assert final_letter(f"The answer is {first}. No, the answer is {last}.") == last
