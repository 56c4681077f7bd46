"""Ask the hub once, briefly, before transformers or datasets ask it again and again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from threading import Thread
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)

from pytest_kvguard.errors import InvalidArgument, Unavailable

PATIENCE = 10.0
"""Seconds after which a hub that has not answered counts as out of reach, as in huggingface_hub."""


def ask_hub(name: str, names: tuple[str, ...]) -> bool:
    """Say whether a model must be read from the hub's cache alone, since the hub is out of reach.

    name: a hub id; names: what else a model may be called, for a hint. One request of at most
    PATIENCE seconds, and none under HF_HUB_OFFLINE: transformers retries each of its files for
    half a minute. Raises InvalidArgument for what is no hub id, and Unavailable for a model that
    the hub does not have or does not give, or that is neither within reach nor in the cache.
    """
    near = get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? otherwise " if near else ""
    try:
        answer = _ask(name, "config.json", "model")
    except HFValidationError:
        raise InvalidArgument(
            f"there is no model folder {name!r}, and it is no hub id (owner/name) either"
        ) from None
    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    if answer is None:
        return False
    if cached:
        return True
    if refusal := _refusal(answer):
        raise Unavailable(f"cannot have model {name!r}: {hint}{refusal}") from answer
    why = " ".join(str(answer).split())[:200] or type(answer).__name__
    raise Unavailable(
        f"cannot have model {name!r}: there is no folder of that name, the hub's cache does not "
        f"hold it, and the hub is out of reach ({why}); {hint}connect and run once, or copy the "
        f"model here and give its folder"
    )


@contextmanager
def read_data_set(name: str) -> Iterator[None]:
    """Let a data set be read from the hub's cache alone while the hub is out of reach.

    As under HF_HUB_OFFLINE, which both libraries look up whenever they are about to ask.
    """
    import datasets

    asked = not datasets.config.HF_HUB_OFFLINE  # HF_DATASETS_OFFLINE sets this one alone
    answer = _ask(name, "README.md", "dataset") if asked else None
    was = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if answer is not None and _refusal(answer) is None:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = was


def _ask(name: str, file: str, kind: str) -> Exception | None:
    """Return None if the hub has a file, or its answer, or what kept it from answering."""
    url = hf_hub_url(name, file, repo_type=kind)
    if constants.HF_HUB_OFFLINE:
        return ConnectionError("HF_HUB_OFFLINE is set")
    return _answer(lambda: get_hf_file_metadata(url, timeout=5))


def _refusal(answer: Exception) -> str | None:
    """Say what to do about a hub that was reached and does not give the model."""
    if isinstance(answer, GatedRepoError):
        return "the hub gives it to those it knows; ask for access on its page, then hf auth login"
    if isinstance(answer, RepositoryNotFoundError):
        return "the hub has none of that name; correct it, or if it is private, hf auth login"
    if isinstance(answer, EntryNotFoundError):
        return "on the hub it holds no config.json; give a model that transformers can load"
    return None


def _answer(ask: Callable[[], Any]) -> Exception | None:
    """Return what a request raised, or None; one that takes longer than PATIENCE is left behind.

    A timeout of the request's own counts anew for each address of a host, and not while its name
    is looked up.
    """
    raised: list[Exception | None] = []

    def run() -> None:
        try:
            ask()
        except Exception as problem:  # a network may fail in any way
            raised.append(problem)
        else:
            raised.append(None)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return raised[0] if raised else TimeoutError(f"no answer within {PATIENCE:g} s")
