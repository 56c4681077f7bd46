"""The model that ships: what it is, what it was trained on, what it can do."""

import re
import sys
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pytest_kvguard.tasks.procedural import PROCEDURAL
from tests.tasks.test_procedural import DRAWS

REASONER = Path(__file__).parents[1] / "fixtures" / "reasoner"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(REASONER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(REASONER, dtype=torch.float32)


@pytest.fixture
def training(monkeypatch):
    """Make the training script's modules importable for one test."""
    monkeypatch.syspath_prepend(str(REASONER))
    yield
    for name in ("curriculum", "documents", "evaluate", "model", "probe", "train", "vocabulary"):
        sys.modules.pop(name, None)


def test_it_is_a_stock_llama_of_at_most_eight_mebibytes(model):
    assert type(model) is LlamaForCausalLM
    assert 800_000 <= sum(p.numel() for p in model.parameters()) <= 4_000_000
    written = [path for path in REASONER.iterdir() if path.suffix in (".safetensors", ".json")]
    assert sum(path.stat().st_size for path in written) <= 8 * 2**20


@pytest.mark.parametrize("name", PROCEDURAL)
def test_its_tokenizer_knows_every_word_and_loses_nothing(tokenizer, name):
    for sample in PROCEDURAL[name](n=50, seed=11).samples:
        ids = tokenizer(sample.text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[1:]) == sample.text


@pytest.mark.parametrize("name", PROCEDURAL)
def test_parts_begin_and_end_with_tokens(tokenizer, name):
    sample = PROCEDURAL[name](n=1).samples[0]
    whole = tokenizer(sample.text, add_special_tokens=False, return_offsets_mapping=True)
    starts = {start for start, _ in whole.offset_mapping}
    at = 0
    for part in sample.parts:
        assert at in starts
        at += len(part.text)


@pytest.mark.parametrize("number", range(100))
def test_a_number_below_a_hundred_is_one_token(tokenizer, number):
    for text in (f" {number}", str(number)):
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == 1


def clauses(text: str) -> set[tuple[str, ...]]:
    """Read what a worked answer multiplies: (container, holds, goods, count)."""
    return set(re.findall(r"a (\w+) holds (\d+) (\w+)\. (\d+) \*", text))


def values(text: str) -> set[tuple[str, ...]]:
    """Read the facts that answers state: (thing, name, value)."""
    return set(re.findall(r"A: The (\w+) of (\w+) is (\d+)\.", text))


def neighbours(text: str) -> set[tuple[str, ...]]:
    """Read which question follows which."""
    questions = re.findall(r"Q: (.*\?)", text)
    return set(pairwise(questions))


def duties(text: str) -> set[tuple[str, ...]]:
    """Read under which rules, in their order, which belongings are asked for."""
    rules, *_ = text.split("\n")
    return {
        (rules, re.search(rf"^{name} has (.*)$", text, flags=re.MULTILINE)[1])
        for name in re.findall(r"What does (\w+) have", text)
    }


@pytest.mark.parametrize(
    ("kind", "name", "instances", "shown"),
    [  # an instance is in the prompt's last question, the last two, or in all of it
        ("word_problems", "word_problems", clauses, 1),
        ("long_answers", "long_answers", clauses, 1),
        ("retrieval_facts", "retrieval_facts", values, 1),
        ("facts", "facts", neighbours, 2),
        ("instructions", "instructions", duties, 99),
        ("omissions", "instructions", duties, 99),
    ],
)
def test_what_a_task_asks_was_never_asked_in_training(training, kind, name, instances, shown):
    from documents import DOCUMENTS

    rng = Random(0)
    documents = ("".join(s.text for s in DOCUMENTS[kind](rng, 512)) for _ in range(600))
    trained = set().union(*map(instances, documents))
    asked = set()
    for _ in range(200):
        drawn = DRAWS[name](rng)
        tail = "Q: ".join(["", *re.split("Q: ", drawn.sample.text)[-shown:]])
        asked |= instances((tail if shown < 99 else drawn.sample.text) + drawn.answer)
    assert len(trained) > 1000
    assert len(asked) > 100
    assert not asked & trained


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_weights(
    training, monkeypatch, tmp_path
):
    import train

    monkeypatch.setattr(train, "exact_answers", lambda model, tokenizer: "not probed")

    def run(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "3", "--threads", "1", *args])
        train.main()

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run("--out", str(whole), "--checkpoint", str(tmp_path / "none.pt"))
    resumed = ["--out", str(halves), "--checkpoint", str(tmp_path / "halves.pt")]
    run(*resumed, "--minutes", "0")
    assert not halves.exists()
    run(*resumed)
    torch.set_flush_denormal(False)
    weights = "model.safetensors"
    assert (whole / weights).read_bytes() == (halves / weights).read_bytes()


def test_the_first_layer_starts_out_looking_one_two_and_three_back(training):
    from model import build_model

    torch.manual_seed(0)
    model = build_model(50, bos=2, eos=[3], pad=0)
    model.set_attn_implementation("eager")
    ids = torch.randint(4, 50, (1, 40))
    with torch.inference_mode():
        attention = model(ids, output_attentions=True).attentions[0][0]  # (Hq, T, T)
    for head, offset in enumerate((1, 2, 3)):
        by_distance = [attention[head].diagonal(-distance).mean() for distance in range(12)]
        assert max(range(12), key=by_distance.__getitem__) == offset


@pytest.mark.parametrize(
    ("name", "params", "least"),
    [
        ("word_problems", {"steps": 2, "shots": 8}, 0.9),
        ("word_problems", {"steps": 3, "shots": 8}, 0.9),
        ("long_answers", {"questions": 6, "shots": 8}, 0.9),
        ("retrieval_facts", {"sentences": 40}, 0.9),
        ("facts", {"shots": 16}, 0.9),
        ("instructions", {"rules": 3, "without": "never"}, 0.9),
    ],
)
def test_it_can_do_what_its_card_says(training, model, name, params, least):
    from evaluate import accuracy

    tokenizer = AutoTokenizer.from_pretrained(REASONER, padding_side="left")
    marks = accuracy(model, tokenizer, PROCEDURAL[name](n=20, **params), limit=20)
    assert sum(marks) / len(marks) >= least
