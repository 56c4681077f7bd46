"""From tokens to marks, with a model that is real but tiny: traces, loops and giving up."""

from dataclasses import replace

import pytest

from pytest_kvguard.engine.grid import Cell
from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.harness.measure import Bench
from pytest_kvguard.harness.replies import LOOK_EVERY, Reply, decode_with_tags, stopping
from pytest_kvguard.models import wrap
from pytest_kvguard.policies import get_policy
from pytest_kvguard.tasks.base import Part, Sample, Task
from tests import tiny
from tests.plugin import stand_in

CELLS = [Cell(get_policy("snapkv"), 0.5), Cell(get_policy("random_tokens"), 0.25)]


@pytest.fixture
def loaded(monkeypatch):
    """Return the model; two of its words are the tags of a reasoning trace."""
    words = ["<think>" if word == "w10" else word for word in stand_in.WORDS]
    monkeypatch.setattr(
        stand_in, "WORDS", ["</think>" if word == "w11" else word for word in words]
    )
    return wrap(tiny.llama(initializer_range=0.02), stand_in.tokenizer(), name="tiny")


def task(end, scorer, n=3, most=8, stop=()):
    samples = tuple(
        Sample(
            f"s{i}",
            (
                Part("document", f"w{12 + i} w20 w30 w40 w21 w31 "),
                Part("question", f"w22 w32{end}"),
            ),
            ("x",),
        )
        for i in range(n)
    )
    return Task("odd", "odd", samples, scorer, max_new_tokens=most, stop=stop)


def test_what_is_written_inside_a_trace_is_kept_but_not_marked(loaded):
    seen = []

    def scorer(text, sample):
        seen.append(text)
        return 1.0

    plain = Bench(loaded).measure(task("", scorer), CELLS)
    assert any(seen)
    assert not any(answer.trace for answer in plain.baseline.answers.values())
    seen.clear()
    thinking = Bench(loaded).measure(task(" <think>", scorer, stop=(" ",)), CELLS)
    for run in (thinking.baseline, *thinking.runs):
        for answer in run.answers.values():
            assert answer.trace
            assert answer.stopped or not answer.text
            assert answer.tokens == 8 or answer.stopped
    assert set(seen) == {answer.text for answer in thinking.baseline.answers.values()} | {
        answer.text for run in thinking.runs for answer in run.answers.values()
    }


def test_a_model_that_loops_is_cut_off_with_every_cache(loaded):
    found = Bench(loaded).measure(task("", lambda text, sample: 1.0, most=600), CELLS)
    for run in (found.baseline, *found.runs):
        answers = run.answers.values()
        assert run.endings["looped"] == sum(answer.looped for answer in answers) > 0
        assert min(answer.tokens for answer in answers) < 600
        for answer in answers:
            assert answer.tokens == 600 or answer.stopped or answer.tokens % LOOK_EVERY == 0


def test_a_baseline_is_given_up_when_its_answers_prove_it(loaded):
    found = Bench(loaded).measure(task("", lambda text, sample: 0.0, n=30), CELLS)
    assert "gets 0 of 19 answers right" in found.given_up
    assert "30 samples show a loss only from 16.7% up" in found.given_up
    assert "(of its 19 answers, 19 were truncated)" in found.given_up
    assert len(found.baseline.scores) == 19
    assert not found.runs


def test_the_tags_of_a_trace_are_read_where_a_tokenizer_calls_them_special():
    tokenizer = stand_in.tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    opening, closing = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    loaded = wrap(tiny.llama(), tokenizer, name="tiny")
    ids = [opening, 20, closing, 21, 2]
    assert "think" not in loaded.decode(ids)
    read = decode_with_tags(tokenizer, loaded.decode)(ids)
    assert read.replace(" ", "") == "<think>w20</think>w21"
    until = stopping(
        task("", lambda text, sample: 1.0), [[20]], tokenizer, loaded.eos, loaded.decode
    )
    assert until.read(ids) == Reply("w21", "w20", "ended")


@pytest.mark.parametrize("mark", [None, float("nan"), -0.1, 1.5, "1"])
def test_a_scorer_that_gives_no_mark_fails_its_run_and_says_so(loaded, mark):
    found = Bench(loaded).measure(task("", lambda text, sample: mark), CELLS)
    for run in (found.baseline, *found.runs):
        assert f"the scorer gave {mark!r} on sample s0" in run.error
        assert "a mark is a number in [0, 1]" in run.error


def test_samples_have_ids_of_their_own(loaded):
    once = task("", lambda text, sample: 1.0)
    twice = replace(once, samples=(*once.samples, once.samples[1]))
    with pytest.raises(InvalidArgument, match="several samples called 's1'"):
        Bench(loaded).measure(twice, CELLS)


def test_every_run_knows_which_samples_share_a_context(loaded):
    asked = task("", lambda text, sample: 1.0, n=4)
    first, second, *others = asked.samples
    same = replace(second, parts=(first.parts[0], second.parts[1]))
    found = Bench(loaded).measure(replace(asked, samples=(first, same, *others)), CELLS)
    for run in (found.baseline, *found.runs):
        assert run.clusters == {"s0": "s0", "s1": "s0", "s2": "s2", "s3": "s3"}
