"""Whether a tokenizer reads and writes a model's language: checked before anything is measured.

A tokenizer that was saved by one version and is read by another, or belongs to another model, may
lose its decoder, its special tokens or its case, and the run goes on with wrong numbers. What is
tolerated is what tokenizers do by design and a model is trained with:

- one space before a stretch of text, which SentencePiece and ``add_prefix_space`` add, and drop
  again when they decode; and before a special token, where a decoder that joins words puts it
- white space that a special token takes with it (``lstrip``, ``rstrip``)
- NFC, in which texts that are canonically equal are the same (Unicode Standard Annex 15)
- unknown tokens for what is not in the vocabulary: how many there may be is judged elsewhere,
  where a task is found unreadable
- ``clean_up_tokenization_spaces``, which is left out: it changes what is shown, not what is read
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any
from unicodedata import normalize

from pytest_kvguard.errors import Refused

WINDOW = 20
"""Characters shown on either side of a difference."""

REMEDY = (
    "give the tokenizer that belongs to the model, or save it anew with the installed transformers"
)


def check_end_tokens(tokenizer: Any, eos: Collection[int], rows: int, *, name: str) -> None:
    """Raise Refused for an end token that can never come, or comes in the middle of an answer.

    eos: token ids of the model's configurations and of its tokenizer; rows: how many tokens the
    model has embeddings for; name: what errors call the model. An end token is special or, as in
    models that end at a blank line, white space.
    """
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    for token in sorted(eos):
        if not 0 <= token < rows:
            raise Refused(
                f"model {name!r}: end token {token} is none of its {rows} tokens, so no answer "
                f"would end; set eos_token_id in its generation_config.json, or {REMEDY}"
            )
        text = _text_of(tokenizer, token)
        if text is None:
            raise Refused(
                f"model {name!r}: its tokenizer does not know end token {token}; set eos_token_id "
                f"in its generation_config.json, or {REMEDY}"
            )
        if token not in special and token not in added and any(map(str.isalnum, text)):
            raise Refused(
                f"model {name!r}: end token {token} is {text!r}, an ordinary word, where answers "
                f"would break off; set eos_token_id in its generation_config.json, or {REMEDY}"
            )


def check_prompt(
    tokenizer: Any, text: str, encoding: Any, template: Sequence[bool], *, name: str
) -> None:
    """Raise Refused for a prompt that its tokens do not stand for.

    text: as it was given to the tokenizer; encoding: what came of it (`tokenizers.Encoding`);
    template: whether each token stands for text of a chat template, where special tokens belong;
    name: what errors call the prompt.
    """
    special = _special(tokenizer)
    ids, offsets = encoding.ids, encoding.offsets
    own = [at for at, added in enumerate(encoding.special_tokens_mask) if not added]
    if own and own[-1] != len(ids) - 1:
        last = _text_of(tokenizer, ids[-1])
        raise Refused(
            f"{name}: the tokenizer puts {last!r} behind the prompt, where the answer must begin; "
            f"load it with add_eos_token=False, or {REMEDY}"
        )
    unknown = tokenizer.unk_token_id
    marks = [at for at in own if ids[at] in special]
    for at in marks:
        start, end = offsets[at]
        content = special[ids[at]]
        if ids[at] == unknown:
            _check_unknown(tokenizer, text, start, end, name)
        elif text[start:end].strip() != content.strip():
            raise Refused(
                f"{name}: the tokenizer makes {text[start:end]!r} the special token {content!r}, "
                f"in {_around(text, start)!r}; {REMEDY}"
            )
        elif not template[at]:
            raise Refused(
                f"{name}: the text holds the special token {content!r}, in "
                f"{_around(text, start)!r}; take it out of the task's text"
            )
    for stretch, tokens, inner in _stretches(
        text, [(ids[at], *offsets[at]) for at in own], special
    ):
        came = str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False)) if tokens else ""
        wanted, found = _plain(stretch, inner), _plain(came, inner)
        if wanted != found:
            raise Refused(f"{name}: {_difference(wanted, found)}; {REMEDY}")


def _check_unknown(tokenizer: Any, text: str, start: int, end: int, name: str) -> None:
    """Refuse an unknown token for text that the vocabulary holds: a step before it is missing."""
    unknown, covered = tokenizer.unk_token_id, text[start:end]
    for spelled in (covered, covered.replace(" ", "Ġ"), covered.replace(" ", "▁")):
        if spelled and tokenizer.convert_tokens_to_ids(spelled) not in (None, unknown):
            raise Refused(
                f"{name}: the tokenizer makes {covered!r} the unknown token "
                f"{tokenizer.unk_token!r}, in {_around(text, start)!r}, though its vocabulary "
                f"holds {spelled!r}; {REMEDY}"
            )


def _special(tokenizer: Any) -> dict[int, str]:
    """Return the text of each special token by its id."""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {i: str(_text_of(tokenizer, i)) for i in tokenizer.all_special_ids}
    return {**named, **added}


def _text_of(tokenizer: Any, token: int) -> str | None:
    """Return a token as its vocabulary writes it, or None if it has no such token."""
    if not 0 <= token < len(tokenizer):
        return None
    text = tokenizer.convert_ids_to_tokens(token)
    return None if text is None else str(text)


def _stretches(
    text: str, tokens: Sequence[tuple[int, int, int]], special: Collection[int]
) -> Iterator[tuple[str, list[int], bool]]:
    """Yield the text between special tokens, its token ids, and whether a special one follows."""
    begin, ids = 0, list[int]()
    for token, start, end in tokens:
        if token in special:
            yield text[begin:start], ids, True
            begin, ids = end, []
        else:
            ids.append(token)
    yield text[begin:], ids, False


def _plain(text: str, inner: bool) -> str:
    """Leave out what is tolerated."""
    text = normalize("NFC", text).removeprefix(" ")
    return text.removesuffix(" ") if inner else text


def _around(text: str, at: int) -> str:
    return text[max(0, at - WINDOW) : at + WINDOW]


def _difference(wanted: str, found: str) -> str:
    pairs = enumerate(zip(wanted, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(wanted), len(found)))
    return (
        f"the tokenizer does not give a prompt's text back: {_around(wanted, at)!r} came back as "
        f"{_around(found, at)!r}"
    )
