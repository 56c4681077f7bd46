"""What is known of a prompt's tokens beside their ids."""

import pytest
from transformers import AutoTokenizer

from pytest_kvguard.harness.encode import contexts, encode
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


def ask(*parts, n=4):
    """Ask n questions; each part is shared, or text for each sample."""
    samples = tuple(
        Sample(
            f"q{i}",
            (
                *(Part(k, text if isinstance(text, str) else text[i]) for k, text in parts),
                Part("question", f" {NAMES[i]} ?"),
            ),
            ("x",),
        )
        for i in range(n)
    )
    return Task("odd", "odd", samples, lambda text, sample: 1.0, max_new_tokens=4)


@pytest.mark.parametrize(
    ("parts", "ahead", "expected"),
    [
        ([("document", NAMES[:4])], False, ["q0", "q1", "q2", "q3"]),
        ([("document", [NAMES[i // 2] for i in range(4)])], False, ["q0", "q0", "q2", "q2"]),
        ([("document", [NAMES[i % 2] for i in range(4)])], True, ["q0", "q1", "q0", "q1"]),
        # Shots that all samples share are part of the task, unless they share their cache too.
        ([("system", NAMES[9]), ("shot", f" {NAMES[8]}")], False, None),
        ([("system", NAMES[9]), ("shot", f" {NAMES[8]}")], True, ["q0"] * 4),
        ([("system", NAMES[9])], True, ["q0"] * 4),
        # The same for all samples that could be drawn, and each has a cache of its own.
        ([("system", NAMES[9]), ("instruction", f" {NAMES[8]}")], False, None),
        ([], False, None),
    ],
)
def test_samples_share_a_context_when_all_before_their_question_is_the_same(
    tokenizer, parts, ahead, expected
):
    task = ask(*parts)
    prompts = encode(task, task.samples, tokenizer, ahead=ahead)
    found = contexts(task.samples, prompts)
    assert found == dict(zip([s.id for s in task.samples], expected or [], strict=False))


@pytest.mark.parametrize(("task", "expected"), [("retrieval(n=20)", 4), ("facts(n=6)", 6)])
def test_samples_of_a_task_share_a_context_where_they_share_its_text(tokenizer, task, expected):
    task = get_task(task)
    prompts = encode(task, task.samples, tokenizer, ahead=False)
    assert len(set(contexts(task.samples, prompts).values())) == expected
