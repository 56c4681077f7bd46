"""The seam to transformers: while it is open, a model's attention is ours.

An attention function registered in ``AttentionInterface`` sees rotated queries and the new keys
and values of every layer, for every model that uses the interface, with no model class named.
The model is called without a cache: what is held, and who may see it, is decided here alone, so
none of transformers' cache or mask code runs and its changes between versions cannot touch us.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pytest_kvguard.errors import Unsupported

NAME = "kvguard"

KNOWN_LAYERS = {"full_attention", "sliding_attention"}

CHANGES_ATTENTION = ("softcap", "s_aux", "position_bias", "head_mask", "indices")
"""Arguments that some models pass to attention and that ours would have to honour."""

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense")
"""What models call the projection behind attention."""


@dataclass(frozen=True)
class Step:
    """One layer's part of one forward pass."""

    layer: int
    query: Tensor  # (R, Hq, Q, D), rotated
    key: Tensor  # (R, Hkv, Q, D), rotated; of the new tokens only
    value: Tensor  # (R, Hkv, Q, D)
    scaling: float
    window: int | None  # positions a sliding layer sees, the token itself included
    output: Tensor | None = None  # (Hq, D, M) what the output projection makes of each head


Attend = Callable[[Step], Tensor]
"""step -> (R, Hq, Q, D), what attention adds up to."""


def _nothing() -> None:
    pass


class Seam:
    """A model whose attention is ours while the seam is open; counts what goes through."""

    def __init__(self, model: PreTrainedModel) -> None:
        check_layers(model)
        self.model = model
        self.forwards = 0
        self.tokens = 0
        self._passed: Callable[[], None] = _nothing
        self._attend: Attend | None = None
        self._before = ""  # the attention of a model that is ours for now

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def vocabulary(self) -> int:
        """How many logits each token has."""
        return int(self.model.config.get_text_config().vocab_size)

    @contextmanager
    def open(self, passed: Callable[[], None] = _nothing) -> Iterator[None]:
        """Take over attention for one block; everything is as before when it ends.

        ``passed`` is called after every pass of the model.
        """
        before = self._before = self.model.config._attn_implementation
        training = self.model.training
        _register(self._attention)
        try:
            self.model.set_attn_implementation(NAME)
        except ValueError as problem:
            raise Unsupported(
                f"{type(self.model).__name__} does not let its attention be replaced, so its cache "
                f"cannot be compressed; use a model that supports attn_implementation='sdpa'"
            ) from problem
        self.model.eval()
        self._passed = passed
        try:
            with torch.inference_mode():
                yield
        finally:
            self._passed = _nothing
            self.model.set_attn_implementation(before)
            self.model.train(training)
            _register(_closed)  # lets go of the model

    @contextmanager
    def lent(self) -> Iterator[PreTrainedModel]:
        """Give the model its own attention back for a while, inside `open`."""
        self.model.set_attn_implementation(self._before)
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(NAME)

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend, *, last: int = 0) -> Tensor:
        """Push tokens through the model and return their logits.

        ids, positions: (R, Q); logits of the last ``last`` tokens, of all when 0 -> (R, Q, V)
        """
        self.forwards += 1
        self.tokens += ids.numel()
        self._attend = attend
        try:
            logits: Tensor = self.model(
                input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=last
            ).logits
        finally:
            self._attend = None
        self._passed()
        return logits

    def _attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        for name in CHANGES_ATTENTION:
            if settings.get(name) is not None:
                raise Unsupported(
                    f"layer {module.layer_idx} of {type(self.model).__name__} attends with "
                    f"{name!r}, which the compressed path does not reproduce; use another model"
                )
        if self._attend is None:
            raise Unsupported("the model was called from outside while its attention was ours")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = _output_projection(module, query.shape[1])
        step = Step(module.layer_idx, query, key, value, scaling, sliding_window, output)
        return self._attend(step).transpose(1, 2).contiguous(), None


def _register(attention: Callable[..., tuple[Tensor, None]]) -> None:
    AttentionInterface.register(NAME, attention)
    with suppress(KeyError):  # kvpress wraps what is registered when it is imported, for good
        del ALL_ATTENTION_FUNCTIONS[NAME]


def cache_argument(module: torch.nn.Module, cache: Cache) -> dict[str, Cache]:
    """Return a transformers cache under the name by which a model or layer of it takes one.

    That is ``past_key_values`` up to transformers 5.23 and ``cache`` from 5.24, which warns of the
    old name.
    """
    known = signature(module.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def check_layers(model: PreTrainedModel) -> None:
    """Raise Unsupported for layers that hold something other than keys and values."""
    config = model.config.get_text_config()
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS)
    if odd:
        raise Unsupported(
            f"{type(model).__name__} has layers of type {', '.join(odd)}; only "
            f"{' and '.join(sorted(KNOWN_LAYERS))} can be compressed or left alone"
        )


def _output_projection(module: Any, heads: int) -> Tensor | None:
    """Return the weights that mix the heads' outputs, (Hq, D, M), where they can be told."""
    for name in OUTPUT_PROJECTIONS:
        if isinstance(linear := getattr(module, name, None), torch.nn.Linear):
            return linear.weight.detach().T.unflatten(0, (heads, -1))
    return None


def _closed(*_: Any, **__: Any) -> tuple[Tensor, None]:
    raise Unsupported("attention was left to pytest-kvguard, which has let go of this model")
