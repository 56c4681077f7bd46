"""What is known of a prompt's tokens beside their ids."""

import pytest
from transformers import AutoTokenizer

from pytest_kvguard.harness.encode import encode
from pytest_kvguard.models import reasoner
from pytest_kvguard.tasks import get_task


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
