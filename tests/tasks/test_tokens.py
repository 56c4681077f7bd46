"""Promises of the map from tokens to parts: one owner each, wherever a tokenizer cuts."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.tasks.base import Part, Sample
from pytest_kvguard.tasks.prompt import render
from pytest_kvguard.tasks.tokens import (
    ADDED,
    context_length,
    token_kinds,
    token_spans,
    unit_positions,
)


def words(text):
    """Offsets of words with the space before them, and of everything else one by one."""
    return [match.span() for match in re.finditer(r" ?\w+|\s|[^\w\s]", text)]


def rendered(*parts):
    return render(Sample("s", tuple(Part(*part) for part in parts), ("1",)))


@st.composite
def prompts_with_tokens(draw):
    kinds = st.sampled_from(["instruction", "shot", "document"])
    part = st.tuples(kinds, st.text("ab \n", max_size=6), st.sampled_from([None, "x", "y"]))
    prompt = rendered(*draw(st.lists(part, max_size=6)), ("question", "why?"))
    cuts = draw(st.sets(st.integers(1, max(1, len(prompt.text) - 1))))
    edges = [0, *sorted(cuts), len(prompt.text)]
    return prompt, list(pairwise(edges))


@given(prompts_with_tokens())
def test_every_token_belongs_to_the_span_of_its_first_character(drawn):
    prompt, offsets = drawn
    owner_of = [i for i, s in enumerate(prompt.spans) for _ in range(s.start, s.end)]
    assert token_spans(prompt.spans, offsets) == tuple(owner_of[start] for start, _ in offsets)


@given(prompts_with_tokens())
def test_units_hold_every_token_of_theirs_once_and_no_other(drawn):
    prompt, offsets = drawn
    owners = token_spans(prompt.spans, offsets)
    units = unit_positions(prompt.spans, owners)
    names = [prompt.spans[owner].unit for owner in owners]
    order = list(dict.fromkeys(name for name in names if name))
    assert [[p for r in unit for p in r] for unit in units] == [
        [p for p, name in enumerate(names) if name == wanted] for wanted in order
    ]


def test_a_unit_of_several_spans_is_one_unit_of_several_ranges():
    prompt = rendered(
        ("shot", "Q1 one\n", "1"), ("shot", "Q2 two\n", "2"),
        ("shot", "A1 six\n", "1"), ("shot", "A2 ten\n", "2"), ("question", "Q3"),
    )  # fmt: skip
    owners = token_spans(prompt.spans, words(prompt.text))
    assert unit_positions(prompt.spans, owners) == (
        (range(0, 3), range(6, 9)),
        (range(3, 6), range(9, 12)),
    )


def test_neighbouring_spans_of_a_unit_are_one_range():
    prompt = rendered(("shot", "Q one", "1"), ("shot", " A six", "1"), ("question", " Q"))
    owners = token_spans(prompt.spans, words(prompt.text))
    assert unit_positions(prompt.spans, owners) == ((range(0, 4),),)


def test_a_word_with_its_space_belongs_where_the_space_is():
    before = rendered(("document", "One. "), ("question", "two"))
    after = rendered(("document", "One."), ("question", " two"))
    offsets = words("One. two")
    assert offsets == [(0, 3), (3, 4), (4, 8)]
    assert token_spans(before.spans, offsets) == (0, 0, 0)
    assert token_spans(after.spans, offsets) == (0, 0, 1)


def test_tokens_the_tokenizer_adds_are_template_and_in_no_unit():
    prompt = rendered(("shot", "one", "a"), ("question", " two"))
    owners = token_spans(prompt.spans, [(0, 0), (0, 3), (3, 7), (0, 0)])
    assert owners == (ADDED, 0, 1, ADDED)
    assert token_kinds(prompt.spans, owners) == ("template", "shot", "question", "template")
    assert unit_positions(prompt.spans, owners) == ((range(1, 2),),)


def byte_level(*, trim):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return tokenizer


@given(st.lists(st.text("ab \né", min_size=1, max_size=5), max_size=5))
def test_white_space_trimmed_to_nothing_still_belongs_where_it_stands(texts):
    shots = [("shot", text, str(i)) for i, text in enumerate(["a", *texts])]
    prompt = rendered(*shots, ("question", "c"))
    whole, trimmed = (byte_level(trim=trim).encode(prompt.text) for trim in (False, True))
    assert whole.tokens == trimmed.tokens
    assert token_spans(prompt.spans, trimmed.offsets) == token_spans(prompt.spans, whole.offsets)


def test_an_added_token_does_not_move_the_white_space_after_it():
    prompt = rendered(("shot", "abc", "1"), ("shot", " ", "2"), ("question", "d"))
    assert token_spans(prompt.spans, [(0, 3), (0, 0), (4, 4), (4, 5)]) == (0, ADDED, 1, 2)


def test_the_context_ends_where_the_first_question_begins():
    prompt = rendered(("shot", "a b", "1"), ("question", " c"), ("shot", " d"), ("question", " e"))
    assert context_length(prompt.spans, token_spans(prompt.spans, words(prompt.text))) == 2
    with pytest.raises(InvalidArgument, match="no token belongs to a question"):
        context_length(prompt.spans, (ADDED, 0, 0))


@pytest.mark.parametrize("offsets", [(2, 9), (-1, 2), (3, 2)])
def test_offsets_of_another_text_are_refused(offsets):
    prompt = rendered(("question", "text"))
    with pytest.raises(InvalidArgument, match=r"do not fit a text of 4 characters"):
        token_spans(prompt.spans, [offsets])
