"""A stand-in model that is real but tiny, and questions that it answers right.

The model knows nothing: what stock transformers makes it answer to each prompt, greedily and with
its full cache, is declared the right answer. So the baseline scores 1.0, and compression, which
changes what it reads, breaks some.
"""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests import tiny

ANSWER = 2  # tokens
SAMPLES = 24
SHOTS = 6
SHOT = 5  # words
QUESTION = 4  # words
PROMPT = 1 + SHOTS * SHOT + QUESTION  # tokens, BOS included
WORDS = [f"w{i}" for i in range(4, tiny.VOCABULARY)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a fast tokenizer of whole words, with a BOS token in front."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    numbers = {word: i for i, word in enumerate([*special, *WORDS])}
    words = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def save(folder: Path) -> Path:
    """Write the model, its tokenizer, its questions and their task; return the folder."""
    model = tiny.llama(initializer_range=0.02)  # mild: most answers survive a mild compression
    model.save_pretrained(folder)
    words = tokenizer()
    words.save_pretrained(folder)
    rows = []
    for number in range(SAMPLES):
        texts = [WORDS[i - 4] for i in tiny.tokens(SHOTS * SHOT + QUESTION, seed=number) if i > 3]
        texts += WORDS[: PROMPT - 1 - len(texts)]
        shots = [" ".join(texts[i * SHOT : (i + 1) * SHOT]) + " " for i in range(SHOTS)]
        question = " ".join(texts[SHOTS * SHOT :])
        ids = words("".join(shots) + question)["input_ids"]
        assert len(ids) == PROMPT
        answer = words.decode(greedy(model, ids), skip_special_tokens=True).split()
        rows.append({"id": f"q{number}", "shots": shots, "question": question, "answer": answer})
    (folder / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
    shutil.copy(Path(__file__).with_name("recall.py"), folder)
    return folder


def greedy(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """Answer without any cache, the whole text read anew for each token."""
    answer: list[int] = []
    while len(answer) < ANSWER:
        with torch.inference_mode():
            logits = model(torch.tensor([[*ids, *answer]]), use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] == tiny.SIZES["eos_token_id"]:
            break
    return answer
