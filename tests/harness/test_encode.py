"""What is known of a prompt's tokens beside their ids."""

import pytest
from transformers import AutoTokenizer

from pytest_kvguard.harness.encode import encode
from pytest_kvguard.models import reasoner
from pytest_kvguard.tasks import get_task
from pytest_kvguard.tasks.base import Part, Sample, Task
from pytest_kvguard.tasks.procedural.words import NAMES


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(reasoner())


@pytest.fixture
def task():
    return get_task("instructions(people=2, sentences=3, n=1)")


def test_passages_follow_the_parts_and_cover_the_prompt(tokenizer, task):
    (prompt,) = encode(task, task.samples, tokenizer, ahead=False)
    passages = prompt.about.passages
    assert [at for passage in passages for at in passage.positions] == list(range(len(prompt.ids)))
    bos, *parts = passages
    assert (bos.kind, bos.positions) == ("template", range(1))
    told = [(part.kind, part.text) for part in task.samples[0].parts]
    read = [
        (
            passage.kind,
            tokenizer.decode(prompt.ids[passage.positions.start : passage.positions.stop]),
        )
        for passage in parts
    ]
    assert read == told


def test_of_a_context_only_what_is_compressed_is_known(tokenizer, task):
    (prompt,) = encode(task, task.samples, tokenizer, ahead=True)
    assert prompt.about.passages[-1].positions.stop == prompt.context < len(prompt.ids)
    assert max(prompt.about.punctuation) < prompt.context


def test_special_tokens_and_punctuation_are_told_apart_from_words(tokenizer, task):
    (prompt,) = encode(task, task.samples, tokenizer, ahead=False)
    about = prompt.about
    assert about.special == (0,)
    marks = {tokenizer.decode([prompt.ids[at]]) for at in about.punctuation}
    assert marks <= {".", ",", ":", "?", ".\n"}
    assert {".", ",", ":", "?"} <= marks
    others = set(range(1, len(prompt.ids))) - set(about.punctuation)
    words = [tokenizer.decode([prompt.ids[at]]) for at in others]
    assert all(word.isspace() or word.strip(" .,:?") for word in words)


def units_read(tokenizer, prompt):
    return [
        "".join(tokenizer.decode(prompt.ids[span.start : span.stop]) for span in unit)
        for unit in prompt.about.units
    ]


def test_units_chosen_anew_are_tokens_of_the_context_and_passages_stay_those_of_the_task(tokenizer):
    asked = ["Q: What is the code of {}?", " A: The code is 47.", " The code of {} is 47.\n"]
    lines = [[line.format(name) for line in asked] for name in NAMES[:2]]
    shots = [Part("shot", "".join(line), f"shot {i}") for i, line in enumerate(lines)]
    sample = Sample("s", (*shots, Part("question", "Q: What is 47? A:")), ("47",))
    task = Task("t", "t", (sample,), lambda completion, sample: 1.0, 5, chat=False)
    (marked,) = encode(task, task.samples, tokenizer, ahead=False)
    (found,) = encode(task, task.samples, tokenizer, ahead=False, units="sentences")
    assert units_read(tokenizer, marked) == [shot.text for shot in shots]
    assert units_read(tokenizer, found) == [*lines[0], *lines[1]]
    assert (marked.about.unit_kind, found.about.unit_kind) == ("shots", "sentences")
    assert marked.about.passages == found.about.passages


def test_sentences_of_a_haystack_are_the_units_its_task_marks(tokenizer):
    task = get_task("retrieval_facts(n=2)")
    found = encode(task, task.samples, tokenizer, ahead=False, units="sentences")
    marked = encode(task, task.samples, tokenizer, ahead=False)
    assert [p.about.units for p in found] == [p.about.units for p in marked]
