"""Units chosen anew: spans cut at their edges, the question and the template in none."""

import pytest

from pytest_kvguard.errors import UnknownName
from pytest_kvguard.options import UNITS as ON_OFFER
from pytest_kvguard.tasks import get_task
from pytest_kvguard.tasks.base import Part, Sample
from pytest_kvguard.tasks.prompt import render
from pytest_kvguard.tasks.units import KINDS_OF_UNITS, with_units


def units(kind, *parts, template=None):
    """Return the text of each unit, its spans apart, in the order of their first."""
    sample = Sample("s", tuple(Part(*part) for part in parts), ("1",))
    before = render(sample, template)
    after = with_units(before, kind)
    assert after.text == before.text
    assert "".join(span.kind[0] * (span.end - span.start) for span in after.spans) == "".join(
        span.kind[0] * (span.end - span.start) for span in before.spans
    )
    found: dict[str, list[str]] = {}
    for span in after.spans:
        if span.unit is not None:
            found.setdefault(span.unit, []).append(after.text[span.start : span.end])
    return list(found.values())


ASK = ("question", "Who? Say it.\n\nUser: me")


def test_the_units_on_offer_are_those_that_can_be_found():
    assert ON_OFFER == KINDS_OF_UNITS


def test_shots_are_what_the_task_marks():
    marked = [("shot", "One. Two.", "a"), ("shot", " Three.", "b"), ("shot", " Four.", "a")]
    assert units("shots", *marked, ASK) == [["One. Two.", " Four."], [" Three."]]


def test_a_sentence_lies_in_one_part_and_never_in_the_question():
    parts = [("system", "Be kind. Be"), ("document", "It rains"), ("document", " here. Yes."), ASK]
    assert units("sentences", *parts) == [
        ["Be kind."], [" Be"], ["It rains"], [" here."], [" Yes."],
    ]  # fmt: skip


def test_a_paragraph_goes_on_over_parts_of_a_kind_as_a_set_of_spans():
    parts = [("instruction", "Read."), ("document", "A.\n\nB.", "x"), ("document", " C."), ASK]
    assert units("paragraphs", *parts) == [["Read."], ["A.\n\n"], ["B.", " C."]]


def test_each_shot_is_read_by_itself():
    parts = [("shot", "Q: 1\n", "a"), ("shot", "A: 2\n", "a"), ("shot", "Q: 3\n", "b"), ASK]
    assert units("paragraphs", *parts) == [["Q: 1\n", "A: 2\n"], ["Q: 3\n"]]


def test_text_between_units_is_in_none():
    parts = [("document", 'Data: {"a": 1}, and\n```\nx\n```\nthe end. '), ASK]
    assert units("json", *parts) == [[' {"a": 1}']]
    assert units("code", *parts) == [["```\nx\n```\n"]]
    assert units("turns", *parts) == []


def test_the_template_belongs_to_no_unit():
    def template(messages):
        return "".join(f"User: {m['content']}\n\nAssistant: " for m in messages)

    parts = [("document", "One.\n\nTwo.\n\n"), ASK]
    assert units("paragraphs", *parts, template=template) == [["One.\n\n"], ["Two.\n\n"]]
    assert units("turns", *parts, template=template) == []


@pytest.mark.parametrize("task", ["retrieval_facts(n=3)", "retrieval(n=1)"])
def test_the_sentences_of_a_haystack_are_those_its_task_marks(task):
    for sample in get_task(task).samples:
        rendered = render(sample)
        documents = [s for s in rendered.spans if s.kind == "document"]
        found = [s for s in with_units(rendered, "sentences").spans if s.kind == "document"]
        assert [(s.start, s.end) for s in found] == [(s.start, s.end) for s in documents]
        assert all(s.unit for s in found)


def test_an_unknown_kind_is_named():
    with pytest.raises(UnknownName, match="unknown kind of units 'sentence'; did you mean 'sente"):
        units("sentence", ASK)
