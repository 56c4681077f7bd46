"""Promises of loading: what cannot be used is refused with its file, its line and its field."""

import gzip
import json
import re

import datasets
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from pytest_kvguard import hub
from pytest_kvguard.errors import InvalidArgument, Unavailable
from pytest_kvguard.tasks.arithmetic import arithmetic
from pytest_kvguard.tasks.load import HubSet, load
from pytest_kvguard.tasks.world_knowledge import world_knowledge

FIELDS = {"question": (str,), "answer": (str, int)}
PART = HubSet("main", "test")


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines, name="rows.jsonl"):
        path = tmp_path / name
        text = "".join(
            f"{line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)}\n"
            for line in lines
        )
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "no_suffix"])
def test_rows_are_read_in_order_and_know_their_line(jsonl, name):
    path = jsonl(
        {"question": "é\u2028?", "answer": 1}, "", {"question": "b", "answer": "2"}, name=name
    )
    rows = load(path, FIELDS, PART)
    assert [row.values["question"] for row in rows] == ["é\u2028?", "b"]
    assert [row.place for row in rows] == [f"{path}, line 1", f"{path}, line 3"]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "holds no rows"),
        (["", " "], "holds no rows"),
        (['{"question": "a", "answer": 1}', "{"], "line 2 is not JSON"),
        (["[1]"], r"line 1 must be a JSON object, got \[1\]"),
        (
            ['{"question": "a"}'],
            "line 1: field 'answer' is missing; the fields there are: question",
        ),
        (['{"question": 3, "answer": 1}'], "line 1: field 'question' must be str, got 3"),
        (['{"question": "a", "answer": true}'], "field 'answer' must be str or int, got True"),
        (['{"question": "a", "answer": null}'], "field 'answer' must be str or int, got None"),
    ],
)
def test_a_bad_file_is_refused_by_line_and_field(jsonl, lines, why):
    path = jsonl(*lines)
    with pytest.raises(InvalidArgument, match=f"{re.escape(path)}.*{why}"):
        load(path, FIELDS, PART)


def test_what_is_no_text_is_refused_with_its_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
    for path in tmp_path.iterdir():
        with pytest.raises(InvalidArgument, match=f"cannot read {re.escape(str(path))}"):
            load(str(path), FIELDS, PART)


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "folder/missing.jsonl", "folder/rows.jsonl.gz", "x"]
)
def test_a_file_that_is_not_there_is_no_hub_data_set(name):
    with pytest.raises(InvalidArgument, match=f"no file '{name}'"):
        load(name, FIELDS, PART)


@pytest.fixture
def answer(monkeypatch):
    """What the hub is made to answer to our one request; unless it is an error, it has the file."""
    given: list[Exception] = []

    def ask(*_: object, **__: object) -> None:
        if given:
            raise given[0]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    return given


def hub_error(kind: type[Exception]) -> Exception:
    """An answer of the hub, without the request it answers."""
    error = kind.__new__(kind)
    Exception.__init__(error, "no")
    return error


@pytest.mark.parametrize(
    ("error", "offline"),
    [
        (None, False),
        (ConnectionError("no route"), True),
        (hub_error(EntryNotFoundError), False),
        (hub_error(RepositoryNotFoundError), False),
    ],
)
def test_without_a_hub_a_data_set_is_read_from_the_cache_alone(answer, monkeypatch, error, offline):
    answer.extend([error] if error else [])
    seen = []

    def load_dataset(*_: object, **__: object):
        seen.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_list([{"question": "1+1?", "answer": "2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("openai/gsm8k", FIELDS, PART)) == 1
    assert seen == [(offline, offline)]
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


def test_hub_rows_are_read_like_a_file(answer, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "1+1?", "answer": "2\n#### 2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = arithmetic(data="openai/gsm8k")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert [(sample.id, sample.target) for sample in task.samples] == [("gsm8k-00000", ("2",))]
    assert task.source == "openai/gsm8k"


def test_without_a_network_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match=r"cannot load 'openai/gsm8k'.*run once.*JSON lines"):
        load("openai/gsm8k", FIELDS, PART)


def test_a_users_problems_are_asked_and_marked(jsonl):
    path = jsonl({"id": "mine", "question": "Six times seven?", "answer": "6*7\n#### 42"})
    (sample,) = arithmetic(shots=2, data=path).samples
    assert (sample.id, sample.target) == ("mine", ("42",))
    assert sample.parts[-1].text == "Q: Six times seven?\nA:"


@pytest.mark.parametrize("answer", ["forty-two", "#### 4 or 5", ""])
def test_an_answer_that_is_no_number_is_refused_by_line(jsonl, answer):
    path = jsonl({"question": "a", "answer": "1"}, {"question": "b", "answer": answer})
    with pytest.raises(InvalidArgument, match="line 2: field 'answer' must be one number"):
        arithmetic(data=path)


def test_an_id_that_comes_twice_is_refused(jsonl):
    row = {"id": "same", "question": "a", "answer": "1"}
    with pytest.raises(
        InvalidArgument, match="line 1: field 'id' must be unique, and 'same' comes 2"
    ):
        arithmetic(data=jsonl(row, row))


def test_users_choices_may_be_answered_by_letter_or_index(jsonl):
    path = jsonl(
        {"question": "Colour?", "choices": ["red", "blue"], "answer": "B"},
        {"question": "Size?", "choices": ["s", "m", "l", "xl"], "answer": 2},
    )
    task = world_knowledge(shots=1, data=path)
    assert [sample.target for sample in task.samples] == [("B",), ("C",)]
    assert task.samples[0].parts[-1].text == "Colour?\nA. red\nB. blue\nAnswer:"
    assert task.chance == pytest.approx((1 / 2 + 1 / 4) / 2)


@pytest.mark.parametrize("answer", ["C", "AB", "", 2, -1])
def test_an_answer_that_is_no_choice_is_refused(jsonl, answer):
    path = jsonl({"question": "Colour?", "choices": ["red", "blue"], "answer": answer})
    with pytest.raises(InvalidArgument, match=f"must be one of A, B or 0 to 1, got {answer!r}"):
        world_knowledge(data=path)
