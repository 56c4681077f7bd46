"""Units of a text against texts cut by hand: ``|`` marks where one unit ends and the next begins.

In texts with units that do not follow each other, ``<`` and ``>`` stand around each.
"""

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kvguard.errors import Unavailable
from pytest_kvguard.tasks.splitters import UNITS, code, json_values, paragraphs, sentences, turns


def cut(split, text):
    return "|".join(text[start:end] for start, end in split(text))


def marked(split, text):
    out, at = "", 0
    for start, end in split(text):
        out += f"{text[at:start]}<{text[start:end]}>"
        at = end
    return out + text[at:]


SENTENCES = [
    "The code of Ana is 47.| The old bridge rests near the quiet river.| The code of Bo is 12.",
    "I saw Dr. Smith.| He left.",
    "Mr. and Mrs. Lee came at 5 p.m.| They ate.",
    "J. K. Rowling wrote it.| I read it.",
    "Use a tool, e.g. a hammer, now.| Then stop.",
    "Use i.e. this.| Or that.",
    "I like it, etc.| He does not.",
    "She lives in the U.S. today.| He does not.",
    "He moved to the U.S.| She stayed.",
    "The U.S. Senate met.| It voted.",
    "She has a Ph.D. in maths.| He has none.",
    "The Co. Ltd. firm won.| We lost.",
    "See Fig. 3 and Sec. 2.1.| It works.",
    "He ate (see p. 5).| She slept.",
    "At 10 a.m. the No. 7 bus leaves.| Run.",
    "I was born on Jan. 5.| It rained.",
    "Pi is 3.14.| E is 2.71.",
    "It cost $3.50.| That is cheap.",
    "Version 1.2.3 is out.| Update now.",
    "He has 4 apples.| She gives him 3.| How many?",
    "Wait... what?| Yes.",
    "Wait… what?| Yes.",
    "Really?!|  Yes.",
    '"Stop!" he said.| She stopped.',
    'He said, "Go home."| Then he left.',
    "Visit example.com.| It is nice.",
    "1. First item.\n|2. Second item.",
    "What is it?\n|A. 5",
    "A. 5 B. 6 C. 7",
    "The answer is B.| The next is C.",
    "48/2 = 24 clips.| 48+24 = 72 clips.\n|#### 72\n\n|Q: How many?| A: 5.\n",
    "A heading\n\n|Line one\nline two.\n \n|  Indented.",
    "J.\u00a0K. Rowling wrote it.| I read it.",
    "No full stop at the end",
]


@pytest.mark.parametrize("text", SENTENCES)
def test_a_sentence_ends_where_a_reader_ends_it(text):
    assert cut(sentences, text.replace("|", "")) == text


@pytest.mark.parametrize("blank", ["\u2028", "\u00a0", "\u3000"])
def test_a_wide_blank_behind_an_initial_does_no_harm(blank):
    """Sentencex 1.0.32 itself panics here."""
    assert cut(sentences, f"B{blank}. Yes.") == f"B{blank}.| Yes."


@pytest.mark.parametrize(
    ("found", "reader"),
    [
        ("(This is one.) This is two.", "(This is one.)| This is two."),
        ('"So do I." They left.', '"So do I."| They left.'),
        ("He left… She stayed.", "He left…| She stayed."),
        ("I. Introduction\nII.| Methods", "I. Introduction\n|II. Methods"),
        ("What is it?\n|A. 5\nB. 6", "What is it?\n|A. 5\n|B. 6"),
    ],
)
def test_known_failures_of_sentencex(found, reader):
    """When one of these is cut as by a reader, move it up."""
    assert cut(sentences, reader.replace("|", "")) == found != reader


@pytest.mark.parametrize(
    "text",
    [
        "One.\n\n|Two.\nStill two.\n\n\n|Three.\n",
        "One.\r\n\r\n|Two.",
        "\n\nOne.\n \t\n|  Two.",
        "One.\nStill one.",
    ],
)
def test_a_paragraph_ends_at_an_empty_line(text):
    assert cut(paragraphs, text.replace("|", "")) == text


@pytest.mark.parametrize(
    "text",
    [
        "Intro.\n<User: Hi.\n  More.\n\n><Assistant: Hello: yes.\n><user : Bye.>",
        "<System: Be kind.\n><HUMAN: Hi.\n><AI: Hi.\n>",
        "The user: nobody.\nAn assistant came.\nUsers: many.",
    ],
)
def test_a_turn_goes_from_its_speaker_to_the_next(text):
    assert marked(turns, re.sub("[<>]", "", text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "Run\n<```python\nx = 1\n```\n>and\n<~~~\ny\n~~~\n>",
        "- item\n\n<  ```\n  x\n  ```\n>  more",
        "<````\n```\nnot the end\n````\n>end",
        "`a` and ``` b ``` are inline.\n\n    indented = 1\n",
        "one\x0b\u2028still one\r\n<```\r\nx\r\n```\r\n>end",
        "<```\nnever closed\n\nuntil the end>",
    ],
)
def test_a_code_block_is_its_lines_and_its_fences(text):
    assert marked(code, re.sub("[<>]", "", text)) == text


@pytest.mark.parametrize(
    "text",
    [
        'Use< {"a": [1, {"b": "}"}]}> or< [true]>.',
        '<{"a": 1}>\n<{"a": 2}>\n',
        'f(x) { return x[i]; }< {"ok": "{ [ "}>',
        '{"open":< [1, 2]>',
        "Nothing: {} [] {a: 1} [x].",
        "See< [1]> and x<[0]>.",  # a citation and an index are arrays as well
    ],
)
def test_a_json_value_is_whole_and_not_within_another(text):
    assert marked(json_values, re.sub("[<>]", "", text)) == text


def test_brackets_nested_beyond_reason_are_no_json():
    assert json_values("[" * 5000) == []


PIECES = st.sampled_from(
    [
        *'a B . ! é 😀 “ ( ) Dr. 3.14 。 ``` ~~~ { } [ ] "a":1 User: - :'.split(),
        *(" ", "\n", "\r\n", "\t", "\u2028", "\u00a0", "\0"),
    ]
)


@pytest.mark.parametrize("kind", UNITS)
@given(pieces=st.lists(PIECES, max_size=20))
def test_units_are_disjoint_in_order_and_never_white_space_alone(kind, pieces):
    text, before = "".join(pieces), 0
    for start, end in UNITS[kind](text):
        assert before <= start < end <= len(text)
        assert text[start:end].strip()
        before = end


@pytest.mark.parametrize("kind", ["sentences", "paragraphs"])
@given(pieces=st.lists(PIECES, max_size=20))
def test_sentences_and_paragraphs_are_the_whole_text(kind, pieces):
    text = "".join(pieces)
    whole = "".join(text[start:end] for start, end in UNITS[kind](text))
    assert whole == (text if text.strip() else "")


@pytest.mark.parametrize(
    ("split", "module", "package"),
    [(sentences, "sentencex", "sentencex"), (code, "markdown_it", "markdown-it-py")],
)
def test_a_library_that_is_missing_is_named_with_how_to_get_it(monkeypatch, split, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Unavailable, match=f"{split.__name__}.* pip install {package}$"):
        split("Text.")
