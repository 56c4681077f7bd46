"""Load a model and its tokenizer by whatever name the user has for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pytest_kvguard.errors import Unavailable
from pytest_kvguard.models.finding import REASONER, find
from pytest_kvguard.models.placement import AUTO, ROOM, check_device, choose_dtype, spread
from pytest_kvguard.models.quiet import quiet
from pytest_kvguard.models.smollm2 import SMOLLM2
from pytest_kvguard.tokenizer_check import check_end_tokens


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, with what belongs to it."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    eos: frozenset[int]

    def decode(self, tokens: Sequence[int]) -> str:
        """Turn tokens into text, special ones left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def load(name: str, *, device: str = AUTO, dtype: str = AUTO, room: int = ROOM) -> Loaded:
    """Load a model by hub id, local folder, GGUF file or a name: ``reasoner``, ``smollm2-135m``.

    device: cpu, cuda, cuda:1, ... or auto (a GPU when there is one; a model that one cannot hold
    goes over all of them, and so it does for cuda); dtype: a name in DTYPES or auto (as the
    checkpoint says on a GPU, float32 on a CPU); room: bytes to leave free on each of several GPUs.

    Raises InvalidArgument for a path or setting that cannot be used, Unavailable when something
    would have to be downloaded and cannot be, or does not fit, and Refused for a model whose end
    tokens its tokenizer does not know.
    """
    where = check_device(device)
    kind = choose_dtype(dtype, where)
    found = find(name)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(found.place, **found.extra)
            over_all = spread(found.place, found.extra, where, kind, room)
            model = AutoModelForCausalLM.from_pretrained(
                found.place, dtype=kind, **(over_all or {}), **found.extra
            )
            if over_all is None:  # what is spread already lies where it belongs
                model = model.to(where)
        except Unavailable:
            raise
        except torch.OutOfMemoryError as problem:
            raise Unavailable(
                f"model {name!r} does not fit on {where}; use a smaller --kv-dtype, a quantized "
                f"checkpoint, several GPUs or --kv-device=cpu"
            ) from problem
        except Exception as problem:  # a hub, a file or a parser may fail in any way
            said = " ".join(str(problem).split()) or type(problem).__name__
            first = said if len(said) <= 300 else f"{said[:297]}..."
            raise Unavailable(
                f"cannot load model {name!r}: {first} (give a hub id that is reachable, a folder "
                f"with config.json and weights, a .gguf file, {REASONER!r} or {SMOLLM2!r})"
            ) from problem
    return wrap(model, tokenizer, name=name)


def wrap(model: PreTrainedModel, tokenizer: Any, *, name: str) -> Loaded:
    """Make a model and tokenizer of your own usable, under the name reports will show.

    Raises Refused for a model whose end tokens its tokenizer does not know.
    """
    eos = _eos(model, tokenizer)
    check_end_tokens(tokenizer, eos, model.get_input_embeddings().weight.shape[0], name=name)
    return Loaded(name, model.eval(), tokenizer, eos)


def _eos(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Collect every token that ends an answer."""
    found: set[int] = set()
    for ids in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)
