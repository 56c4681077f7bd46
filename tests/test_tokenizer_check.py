"""Tokenizers of several kinds, whole and broken, each through the encoding of the measurement."""

import copy
import json
from collections.abc import Callable

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from pytest_kvguard.errors import Refused
from pytest_kvguard.harness.encode import encode
from pytest_kvguard.models import wrap
from pytest_kvguard.tasks import get_task
from pytest_kvguard.tasks.base import Part, Sample, Task
from pytest_kvguard.tokenizer_check import check_end_tokens
from tests import tiny

END, START, UNKNOWN = "<|end|>", "<|start|>", "<unk>"
TEXT = (
    "Q: What is 3 + 4?\nA: The answer is 7.\n\nQ: Say  `x = {'a': 1}`\tin Zürich, “now” (≥ 2)!\nA:"
)
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "<|start|>assistant\n"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def task(text: str = TEXT, *, chat: bool = False) -> Task:
    shot, question = text[: len(text) // 2], text[len(text) // 2 :]
    sample = Sample("q7", (Part("shot", shot, "s"), Part("question", question)), ("7",))
    return Task("t", "t", (sample,), lambda completion, sample: 1.0, 5, chat=chat)


def read(tokenizer: PreTrainedTokenizerFast, text: str = TEXT, *, chat: bool = False) -> None:
    """Encode a sample as a measurement does."""
    asked = task(text, chat=chat)
    encode(asked, asked.samples, tokenizer, ahead=False)


def fast(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    names = {"eos_token": END, "unk_token": None, **names}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.add_special_tokens({"additional_special_tokens": [START]})
    made.chat_template = CHATML
    return made


def byte_level(*, prefix: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=BYTES, special_tokens=[END, START], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def metaspace(scheme: str = "always") -> Tokenizer:
    """As SentencePiece: a Unigram model with byte fallback, spaces written as ▁."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted({*TEXT.replace(" ", "▁"), "▁"} - {"ü", "≥", " "})
    vocabulary = [(UNKNOWN, 0.0), (END, 0.0), (START, 0.0), *((piece, -9.0) for piece in pieces)]
    vocabulary += [(letter, -3.0) for letter in letters] + [("▁answer", -2.0), ("▁is", -2.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([] if scheme == "never" else [decoders.Strip(" ", 1, 0)])
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (UNKNOWN, END, START)])
    return tokenizer


def whole_words() -> Tokenizer:
    """As the model that ships: words with the space before them, nothing lost."""
    pattern = r" ?[A-Za-zü]+| ?[0-9]+|\n+| ?[^\sA-Za-z0-9]|\s"
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    found = dict.fromkeys(piece for piece, _ in words.pre_tokenize_str(TEXT))
    named = [END, START, UNKNOWN, *found, *"abcdefghijklmnopqrstuvwxyz\n"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(named))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer, tokenizer.decoder = words, decoders.Fuse()
    tokenizer.add_special_tokens([END, START, UNKNOWN])
    return tokenizer


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    bos = (START, tokenizer.token_to_id(START))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[bos]
    )
    return tokenizer


def with_rstrip(tokenizer: Tokenizer) -> Tokenizer:
    """As in Phi-3: special tokens that take the white space after them along."""
    tokenizer.add_special_tokens([AddedToken(t, rstrip=True, special=True) for t in (END, START)])
    return tokenizer


def composed(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


HEALTHY: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level BPE": lambda: fast(byte_level()),
    "byte-level BPE, prefix space": lambda: fast(byte_level(prefix=True)),
    "byte-level BPE, BOS": lambda: fast(with_bos(byte_level())),
    "byte-level BPE, NFC": lambda: fast(composed(byte_level())),
    "byte-level BPE, clean-up": lambda: fast(byte_level(), clean_up_tokenization_spaces=True),
    "byte-level BPE, rstrip": lambda: fast(with_rstrip(byte_level())),
    "Unigram, always": lambda: fast(metaspace(), unk_token=UNKNOWN),
    "Unigram, first": lambda: fast(metaspace("first"), unk_token=UNKNOWN),
    "Unigram, never": lambda: fast(metaspace("never"), unk_token=UNKNOWN),
    "Unigram, BOS": lambda: fast(with_bos(metaspace()), unk_token=UNKNOWN),
    "whole words": lambda: fast(whole_words(), unk_token=UNKNOWN),
}


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", HEALTHY)
@pytest.mark.parametrize(
    "text", [TEXT, f" {TEXT}", "Zu\u0308rich? A . , !", "\n\nA:", "Unseen words…? "]
)
def test_a_healthy_tokenizer_is_none_the_worse(kind, chat, text):
    read(HEALTHY[kind](), text, chat=chat)


def changed(tokenizer: PreTrainedTokenizerFast, **parts: object) -> PreTrainedTokenizerFast:
    """Exchange parts of the tokenizer.json."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(copy.deepcopy(parts))
    return fast(Tokenizer.from_str(json.dumps(state)), unk_token=tokenizer.unk_token)


def spaces_are_special() -> PreTrainedTokenizerFast:
    """What became of SmolLM2 when one transformers read what another had saved.

    Nothing writes spaces as bytes any more, so they are unknown, and unknown is a special token.
    """
    tokenizer = fast(byte_level())
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return changed(tokenizer, pre_tokenizer=None, model={**model, "unk_token": END})


def spaces_are_unknown() -> PreTrainedTokenizerFast:
    tokenizer = spaces_are_special()
    tokenizer.unk_token = END
    return tokenizer


def no_decoder() -> PreTrainedTokenizerFast:
    return changed(fast(byte_level()), decoder=None)


def small_letters() -> PreTrainedTokenizerFast:
    return changed(fast(byte_level()), normalizer={"type": "Lowercase"})


def ends_prompts() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    end = (END, tokenizer.token_to_id(END))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[end]
    )
    return fast(tokenizer)


def no_spaces() -> PreTrainedTokenizerFast:
    return changed(
        fast(byte_level()),
        normalizer={"type": "Replace", "pattern": {"Regex": " +"}, "content": " "},
    )


def compatible() -> PreTrainedTokenizerFast:
    """NFKC, under which other characters come back: “½” as three of them."""
    return changed(fast(byte_level()), normalizer={"type": "NFKC"})


def word_pieces() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=[UNKNOWN, END, START], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return fast(tokenizer, unk_token=UNKNOWN)


LOST = "the tokenizer does not give a prompt's text back: "


@pytest.mark.parametrize(
    ("broken", "text", "expected"),
    [
        (
            spaces_are_special,
            TEXT,
            f"the tokenizer makes ' ' the special token '{END}', in 'Q: What is 3 + 4?\\nA: T'; ",
        ),
        (
            spaces_are_unknown,
            TEXT,
            f"the tokenizer makes ' ' the unknown token '{END}', in 'Q: What is 3 + 4?\\nA: T', "
            "though its vocabulary holds 'Ġ'; ",
        ),
        (no_decoder, TEXT, f"{LOST}'Q: What is 3 + 4?\\nA: ' came back as "),
        (
            small_letters,
            TEXT,
            f"{LOST}'Q: What is 3 + 4?\\nA:' came back as 'q: what is 3 + 4?\\na:'",
        ),
        (
            no_spaces,
            TEXT,
            f"{LOST}\"nswer is 7.\\n\\nQ: Say  `x = {{'a': 1}}`\\tin Z\" came back as ",
        ),
        (
            compatible,
            "Q: 2½ cups? A:",
            f"{LOST}'Q: 2½ cups? A:' came back as 'Q: 21\u20442 cups? A:'",
        ),
        (word_pieces, TEXT, f"{LOST}'Q: What is 3 + 4?\\nA: ' came back as "),
        (
            ends_prompts,
            TEXT,
            f"the tokenizer puts '{END}' behind the prompt, where the answer must begin; load it "
            f"with add_eos_token=False, or ",
        ),
        (
            HEALTHY["byte-level BPE"],
            f"Q: What does {END} mean? A:",
            f"the text holds the special token '{END}', in 'Q: What does {END} mean? A:'; take it",
        ),
    ],
)
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_a_broken_tokenizer_is_refused_with_the_first_text_that_differs(
    broken, text, expected, chat
):
    if broken is ends_prompts and chat:
        read(broken(), text, chat=chat)  # a template is the whole prompt, nothing is put behind it
        return
    with pytest.raises(Refused) as caught:
        read(broken(), text, chat=chat)
    assert str(caught.value).startswith("sample 'q7': ")
    if not chat:
        assert str(caught.value).startswith(f"sample 'q7': {expected}")
    assert len(str(caught.value)) < 350


def test_special_tokens_of_a_template_are_where_they_belong():
    tokenizer = HEALTHY["byte-level BPE"]()
    (prompt,) = encode(task(chat=True), task(chat=True).samples, tokenizer, ahead=False)
    assert [tokenizer.decode([prompt.ids[at]]) for at in prompt.about.special] == [
        START, END, START
    ]  # fmt: skip


def test_unknown_words_are_left_to_the_check_of_what_a_model_can_read():
    tokenizer = HEALTHY["whole words"]()
    text = "Q: What is xyzzy? A: 7. What is the answer to plugh plugh?"
    (prompt,) = encode(task(text), task(text).samples, tokenizer, ahead=False)
    assert prompt.ids.count(tokenizer.unk_token_id) > 3


@pytest.mark.parametrize("name", ["facts", "word_problems", "instructions", "long_answers"])
def test_the_shipped_model_reads_its_tasks(name):
    from transformers import AutoTokenizer

    from pytest_kvguard.models import reasoner

    asked = get_task(name)
    assert len(encode(asked, asked.samples, AutoTokenizer.from_pretrained(reasoner()), ahead=False))


ROWS = 300
WORD = whole_words().token_to_id("Q")


@pytest.mark.parametrize(
    ("eos", "expected"),
    [
        (
            {ROWS},
            "model 'm': end token 300 is none of its 300 tokens, so no answer would end; set ",
        ),
        ({-1}, "model 'm': end token -1 is none of its 300 tokens"),
        ({299}, "model 'm': its tokenizer does not know end token 299; set eos_token_id in its"),
        (
            {WORD},
            "model 'm': end token {number} is 'Q', an ordinary word, where answers would break",
        ),
        (
            {0, WORD},
            "model 'm': end token {number} is 'Q', an ordinary word, where answers would br",
        ),
    ],
)
def test_an_end_token_that_cannot_end_an_answer_is_refused(eos, expected):
    tokenizer = HEALTHY["whole words"]()
    with pytest.raises(Refused) as caught:
        check_end_tokens(tokenizer, eos, ROWS, name="m")
    assert str(caught.value).startswith(expected.format(number=WORD))


def test_special_tokens_and_blank_lines_may_end_an_answer():
    tokenizer = HEALTHY["whole words"]()
    blank = tokenizer.convert_tokens_to_ids("\n\n")
    assert blank is not None
    for eos in (set(), {0}, {0, 1}, {blank}):
        check_end_tokens(tokenizer, eos, ROWS, name="m")


def test_a_model_is_checked_when_it_is_wrapped():
    model = tiny.llama()
    model.generation_config.eos_token_id = [2, tiny.VOCABULARY]
    with pytest.raises(Refused, match=r"model 'mine': end token 97 is none of its 97 tokens"):
        wrap(model, HEALTHY["whole words"](), name="mine")
