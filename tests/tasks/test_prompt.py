"""Promises of rendering: nothing of a sample is lost, and every character has one owner."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment, TemplateError

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.tasks.base import Part, Sample
from pytest_kvguard.tasks.prompt import Rendered, Span, messages, render


def refuse(message):
    raise TemplateError(message)


def chat_template(source):
    compiled = Environment().from_string(source, globals={"raise_exception": refuse})
    return lambda messages: compiled.render(messages=messages)


CHATML = chat_template(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
TRIMMING = chat_template(
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}[assistant]"
)
SYSTEM_IN_USER = chat_template(
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% endif %}"
    "<user>{{ s }}{{ messages[-1].content | trim }}</user><model>"
)
NO_SYSTEM = chat_template(
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
DROPS_SYSTEM = chat_template(
    "{% for m in messages if m.role == 'user' %}<user>{{ m.content }}{% endfor %}"
)
LOWERS = chat_template("{% for m in messages %}<{{ m.role }}>{{ m.content | lower }}{% endfor %}")
TWICE = chat_template("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")
COUNTS = chat_template(
    "{% for m in messages %}{{ m.content | length }}:{{ m.content }}{% endfor %}"
)
HONEST = {"chatml": CHATML, "trimming": TRIMMING, "system in user": SYSTEM_IN_USER}

texts = st.text("ab \n.<é😀", max_size=8)
units = st.sampled_from([None, "one", "two"])
inner = st.builds(
    Part, st.sampled_from(["instruction", "shot", "document", "question"]), texts, units
)


@st.composite
def samples(draw):
    system = draw(st.lists(st.builds(Part, st.just("system"), texts, units), max_size=2))
    asked = Part("question", draw(texts.filter(str.strip)))
    return Sample("s", (*system, *draw(st.lists(inner, max_size=6)), asked), target=("1",))


def shown(rendered, span):
    return rendered.text[span.start : span.end]


@pytest.mark.parametrize("template", [None, *HONEST.values()], ids=["plain", *HONEST])
@given(sample=samples())
def test_every_character_belongs_to_exactly_one_span(template, sample):
    rendered = render(sample, template)
    owners = [sum(s.start <= i < s.end for s in rendered.spans) for i in range(len(rendered.text))]
    assert owners == [1] * len(rendered.text)


@given(sample=samples())
def test_plain_rendering_is_the_parts_as_they_are(sample):
    rendered = render(sample)
    assert rendered.text == sample.text
    assert [(s.kind, shown(rendered, s), s.unit) for s in rendered.spans] == [
        (part.kind, part.text, part.unit) for part in sample.parts if part.text
    ]


@given(sample=samples())
def test_a_chat_template_that_keeps_messages_keeps_every_part(sample):
    rendered = render(sample, CHATML)
    assert rendered.text == CHATML(messages(sample))
    ours = [span for span in rendered.spans if span.kind != "template"]
    assert [(s.kind, shown(rendered, s), s.unit) for s in ours] == [
        (part.kind, part.text, part.unit) for part in sample.parts if part.text
    ]


@given(sample=samples())
def test_a_template_that_trims_costs_only_white_space_at_the_ends(sample):
    rendered = render(sample, TRIMMING)
    ours = [span for span in rendered.spans if span.kind != "template"]
    for message in messages(sample):
        mine = [s for s in ours if (s.kind == "system") == (message["role"] == "system")]
        assert "".join(shown(rendered, s) for s in mine) == message["content"].strip()


def test_what_the_template_writes_is_kind_template():
    parts = (Part("system", "Be brief.\n"), Part("shot", " 1+1=2\n", "a"), Part("question", "2+2="))
    rendered = render(Sample("s", parts, ("4",)), TRIMMING)
    assert [(s.kind, shown(rendered, s), s.unit) for s in rendered.spans] == [
        ("template", "<s>[system]", None),
        ("system", "Be brief.", None),
        ("template", "[user]", None),
        ("shot", "1+1=2\n", "a"),
        ("question", "2+2=", None),
        ("template", "[assistant]", None),
    ]


def test_text_that_also_stands_in_the_template_is_found_where_it_was_put():
    parts = (Part("system", "system"), Part("question", "user"))
    rendered = render(Sample("s", parts, ("4",)), CHATML)
    assert rendered.text.index("system") < rendered.spans[1].start == len("<|im_start|>system\n")
    assert [shown(rendered, s) for s in rendered.spans if s.kind != "template"] == [
        "system",
        "user",
    ]


def test_system_parts_are_one_system_message_and_the_rest_one_user_message():
    parts = (Part("system", "S"), Part("system", "s"), Part("shot", "A"), Part("question", "B"))
    assert messages(Sample("s", parts, ("4",))) == [
        {"role": "system", "content": "Ss"},
        {"role": "user", "content": "AB"},
    ]
    assert messages(Sample("s", parts[2:], ("4",))) == [{"role": "user", "content": "AB"}]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (NO_SYSTEM, "'Only yes.' is refused by the chat template: System role not supported"),
        (DROPS_SYSTEM, "'Only yes.' is no system message to the chat template"),
        (LOWERS, "'Only yes.' is not in what the chat template returns"),
        (TWICE, "'Only yes.' is no system message"),
        (COUNTS, "'Only yes.Is it?' changes what the chat template writes around it"),
    ],
    ids=["refuses", "drops", "rewrites", "repeats", "counts"],
)
def test_a_template_that_loses_text_is_refused_by_naming_the_text(template, why):
    sample = Sample("rule-7", (Part("system", "Only yes."), Part("question", "Is it?")), ("yes",))
    with pytest.raises(InvalidArgument, match=f"sample 'rule-7': {re.escape(why)}.*chat=False"):
        render(sample, template)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ((), "last part must be a question"),
        ((Part("question", "?"), Part("shot", "a")), "last part must be a question"),
        ((Part("question", " \n"),), "last part must be a question with text"),
        (
            (Part("shot", "a"), Part("system", "b"), Part("question", "?")),
            "system parts come first",
        ),
    ],
)
def test_parts_out_of_order_are_refused(parts, why):
    with pytest.raises(InvalidArgument, match=why):
        render(Sample("s", parts, ("1",)))


@pytest.mark.parametrize(
    ("spans", "why"),
    [
        ([(0, 2), (3, 4)], "must start at 2"),
        ([(0, 2), (1, 4)], "must start at 2"),
        ([(0, 4), (4, 4)], "not be empty"),
        ([(0, 3)], "end at 3, but the text at 4"),
    ],
    ids=["gap", "overlap", "empty", "short"],
)
def test_spans_that_do_not_cover_the_text_are_refused(spans, why):
    with pytest.raises(InvalidArgument, match=why):
        Rendered("text", tuple(Span(start, end, "shot") for start, end in spans))
