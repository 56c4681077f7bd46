"""Promises of retrieval: what is asked for is there once, and found only when it is whole."""

import hashlib
import re
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_kvguard.errors import InvalidArgument, Unavailable
from pytest_kvguard.tasks import filler
from pytest_kvguard.tasks.filler import NOISE, prose
from pytest_kvguard.tasks.retrieval import INSTRUCTION, retrieval

NEEDLE = re.compile(r"One of the special magic numbers for (.+?) is: (\d+)\.")


def documents(sample):
    return [part for part in sample.parts if part.kind == "document"]


def hidden(sample):
    """What an independent reader finds: key -> its values, in the order of the text."""
    found = {}
    for part in documents(sample):
        if match := NEEDLE.fullmatch(part.text.strip()):
            found.setdefault(match[1], []).append(match[2])
    return found


def asked(sample):
    return re.search(r"numbers? for ([a-z]+ [a-z]+) (?:is|are):$", sample.parts[-1].text)[1]


@settings(max_examples=40)
@given(
    length=st.integers(700, 1000),
    needles=st.integers(1, 4),
    values=st.integers(1, 3),
    digits=st.integers(4, 18),
    kind=st.sampled_from(["noise", "prose"]),
    data=st.data(),
)
def test_every_key_that_is_asked_for_is_hidden_with_all_its_values(
    length, needles, values, digits, kind, data
):
    together = data.draw(st.integers(1, needles))
    task = retrieval(
        length=length,
        needles=needles,
        values=values,
        digits=digits,
        filler=kind,
        questions_per_context=together,
        n=7,
    )
    for sample in task.samples:
        found = hidden(sample)
        everything = list(chain.from_iterable(found.values()))
        assert len(found) == needles
        assert len(everything) == len(set(everything)) == needles * values
        assert {len(value) for value in everything} == {digits}
        assert sorted(found[asked(sample)]) == sorted(sample.target)
        assert task.scorer(f"They are {', '.join(sample.target)}.", sample) == 1
        others = [value for key, group in found.items() if key != asked(sample) for value in group]
        assert task.scorer(" ".join(others), sample) == 0


@pytest.mark.parametrize("kind", ["noise", "prose"])
def test_a_context_is_as_long_as_asked_or_less_than_a_sentence_shorter(kind):
    longest = max(len(sentence.split()) for sentence in (NOISE if kind == "noise" else prose()))
    lengths = {
        sum(len(part.text.split()) for part in sample.parts if part.kind != "question")
        for sample in retrieval(length=403, filler=kind, questions_per_context=1).samples
    }
    assert 403 - longest < min(lengths)
    assert max(lengths) == 403


def test_every_sentence_is_a_unit_and_the_question_is_none():
    sample = retrieval().samples[0]
    assert [part.text for part in sample.parts if part.kind == "instruction"] == [INSTRUCTION]
    assert len({part.unit for part in documents(sample)}) == len(documents(sample)) > 50
    assert all(part.text.count(".") == 1 for part in documents(sample))
    assert (sample.parts[-1].kind, sample.parts[-1].unit) == ("question", None)


def test_so_many_samples_share_a_context_and_ask_for_different_keys():
    samples = retrieval(questions_per_context=4, n=10).samples
    contexts = [sample.parts[:-1] for sample in samples]
    assert [contexts.index(context) for context in contexts] == [0] * 4 + [4] * 4 + [8] * 2
    assert len({(context, asked(s)) for context, s in zip(contexts, samples, strict=True)}) == 10


def test_fewer_samples_are_the_first_of_more():
    assert retrieval(n=12).samples == retrieval(n=40).samples[:12]


def test_another_seed_or_parameter_gives_other_contexts_and_other_ids():
    tasks = [retrieval(n=5), retrieval(n=5, seed=1), retrieval(n=5, digits=7)]
    assert len({sample.id for task in tasks for sample in task.samples}) == 15
    assert len({sample.target for task in tasks for sample in task.samples}) == 15


def test_needles_stand_at_every_depth():
    depths = []
    for sample in retrieval(n=100, questions_per_context=1).samples:
        texts = [part.text for part in documents(sample)]
        depths += [i / (len(texts) - 1) for i, text in enumerate(texts) if NEEDLE.search(text)]
    assert min(depths) == 0
    assert max(depths) == 1
    assert 0.4 < sum(depths) / len(depths) < 0.6


def test_the_order_of_asking_is_not_the_order_of_hiding():
    firsts = [next(iter(hidden(s))) == asked(s) for s in retrieval(n=500).samples[::5]]
    assert 5 < sum(firsts) < 40  # of 100, 20 of them by chance


def test_the_noise_prompts_are_these_under_every_python():
    text = "".join(sample.text for sample in retrieval(n=20).samples)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "3f0b454966f5e697"


def test_filler_holds_no_digit_and_reads_as_sentences():
    assert len(prose()) > 500
    for sentence in (*NOISE, *prose()):
        assert re.fullmatch(r"[A-Z]\D+[.!?]", sentence)
        assert "*" not in sentence


def test_a_python_without_its_help_topics_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    filler.prose.cache_clear()
    with pytest.raises(Unavailable, match="filler='noise'"):
        retrieval(filler="prose")


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"filler": "essay"}, "filler must be one of noise, prose, got 'essay'"),
        ({"needles": 0}, "needles must be a whole number, 1 to 33, got 0"),
        ({"values": 0}, "values must be a whole number, 1 to 100, got 0"),
        ({"digits": 3}, "digits must be a whole number, 4 to 18, got 3"),
        ({"digits": 19}, "digits must be a whole number, 4 to 18, got 19"),
        ({"needles": 2}, "questions_per_context must be a whole number, 1 to 2, got 5"),
        ({"n": 0}, "n must be a whole number, 1 to 100000, got 0"),
        ({"length": 90}, "length=90 words cannot hold 5 needles apart"),
        ({"length": 0}, "length must be a whole number, 1 to 1000000, got 0"),
        ({"length": 200.5}, r"length must be a whole number, .*got 200.5"),
    ],
)
def test_what_cannot_be_built_is_refused(params, why):
    with pytest.raises(InvalidArgument, match=why):
        retrieval(**params)
