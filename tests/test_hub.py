"""A hub is asked once, and not waited for."""

import time

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from pytest_kvguard import hub, models
from pytest_kvguard.errors import Unavailable


def said(kind: type[Exception]) -> Exception:
    """An answer of the hub, without the request it answers."""
    answer = kind.__new__(kind)
    Exception.__init__(answer, "no")
    return answer


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A hub that answers with what is put into this list, and an empty cache of it."""
    answers: list[object] = []

    def ask(*_: object, **__: object) -> object:
        answer = answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    return answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (ConnectionError("no route"), "the hub is out of reach (no route); connect and run once, "),
        (said(RepositoryNotFoundError), "the hub has none of that name; correct it, or if it is "),
        (said(GatedRepoError), "the hub gives it to those it knows; ask for access on its page, "),
    ],
)
def test_a_hub_id_that_cannot_be_had_says_why_and_what_to_do(online, answer, expected):
    online.append(answer)
    with pytest.raises(Unavailable) as caught:
        models.load("owner/name")
    assert str(caught.value).startswith("cannot have model 'owner/name': ")
    assert expected in str(caught.value)


def test_a_hub_that_answers_is_asked_for_the_model(online):
    online.append("metadata")
    assert models.find("owner/name") == models.Checkpoint("owner/name", {})


@pytest.mark.parametrize("answer", [ConnectionError("no route"), said(GatedRepoError)])
def test_what_the_cache_holds_is_read_from_it_alone_without_a_hub(online, monkeypatch, answer):
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    online.append(answer)
    assert models.find("owner/name").extra == {"local_files_only": True}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert models.find("owner/name").extra == {"local_files_only": True}
    assert online == []


def test_offline_no_request_is_made(online, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match=r"out of reach \(HF_HUB_OFFLINE is set\)"):
        models.load("owner/name")  # a request would find no answer in the list


def test_a_hub_that_does_not_answer_is_not_waited_for(online, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *_, **__: time.sleep(5))
    begun = time.monotonic()
    with pytest.raises(Unavailable, match=r"out of reach \(no answer within 0.1 s\)"):
        models.load("owner/name")
    assert time.monotonic() - begun < 3


def test_a_name_that_is_nearly_ours_is_hinted_at(online):
    online.append(ConnectionError("no route"))
    with pytest.raises(Unavailable, match="did you mean 'smollm2-135m'"):
        models.load("smollm2-135")
