"""The hook into transformers: while it is open, a model's attention is computed by the engine.

An attention function registered in ``AttentionInterface`` sees rotated queries and the new keys
and values of every layer, for every model that uses the interface, with no model class named.
The model is called without a cache: what is held, and who may see it, is decided by the engine
alone, so none of transformers' cache or mask code runs and its changes cannot touch us.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pytest_kvguard.engine.attention import AttentionCall, Scoring
from pytest_kvguard.engine.rope import FIXED_KINDS, Rotation
from pytest_kvguard.errors import Unsupported

NAME = "kvguard"

KNOWN_LAYERS = {"full_attention", "sliding_attention"}

CHANGES_ATTENTION = ("position_bias", "head_mask", "indices", "block_indices", "sinks")
"""Arguments that some models pass to attention and that ours would have to honour."""

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense")
"""What models call the projection behind attention."""

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Fused attention that costs nothing for a new shape; cuDNN's plans each shape anew (45 ms)."""


Attend = Callable[[AttentionCall], Tensor]
"""call -> (R, Hq, Q, D), what attention adds up to."""


def no_callback() -> None:
    """Do nothing."""


class AttentionHook:
    """A model whose attention is ours while the hook is open; counts what goes through it."""

    def __init__(self, model: PreTrainedModel) -> None:
        check_layers(model)
        self.model = model
        self.forwards = 0  # passes of the model
        self.tokens = 0  # tokens that went through it, padding included
        self.prefills = 0  # prompts that went through it from their first token
        self._passed: Callable[[], None] = no_callback
        self._attend: Attend | None = None
        self._rotation: Rotation | None = None
        self._before = ""  # the attention of a model that is ours for now

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go; layers may lie on other devices."""
        return self.model.get_input_embeddings().weight.device

    @property
    def vocabulary(self) -> int:
        """How many logits each token has."""
        return int(self.model.config.get_text_config().vocab_size)

    def rotation(self) -> Rotation:
        """Return how keys are rotated by position; see `find_rotation`. The hook must be open."""
        if self._rotation is None:
            self._rotation = find_rotation(self)
        return self._rotation

    @contextmanager
    def open(self, passed: Callable[[], None] = no_callback) -> Iterator[None]:
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
            with torch.inference_mode(), sdpa_kernel(BACKENDS):
                yield
        finally:
            self._passed = no_callback
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
        logits = self.call(ids, positions, attend, last=last)
        self.passed(ids.numel())
        return logits

    def prefill(self, ids: Tensor, positions: Tensor, attend: Attend) -> None:
        """Push prompts through the model; those that begin with position 0 count as prefills."""
        self.prefills += int((positions[:, 0] == 0).sum())
        self.forward(ids, positions, attend, last=1)

    def call(self, ids: Tensor, positions: Tensor, attend: Attend, *, last: int = 0) -> Tensor:
        """Do what `forward` does, without counting: a captured graph counts its replays."""
        self._attend = attend
        try:
            logits: Tensor = self.model(
                input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=last
            ).logits
        finally:
            self._attend = None
        return logits

    def passed(self, tokens: int) -> None:
        """Count one pass of the model over this many tokens."""
        self.forwards += 1
        self.tokens += tokens
        self._passed()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave what goes through the model out of the counts: it is no part of a measurement."""
        counts = self.forwards, self.tokens, self.prefills
        try:
            yield
        finally:
            self.forwards, self.tokens, self.prefills = counts

    def _attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
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
        call = AttentionCall(
            module.layer_idx,
            query,
            key,
            value,
            Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux),
            sliding_window,
            _output_projection(module, query.shape[1]),
        )
        return self._attend(call).transpose(1, 2).contiguous(), None


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
        linear = getattr(module, name, None)
        if isinstance(linear, torch.nn.Linear) and not linear.weight.is_meta:  # not on a disk
            return linear.weight.detach().T.unflatten(0, (heads, -1))
    return None


def _closed(*_: Any, **__: Any) -> tuple[Tensor, None]:
    raise Unsupported("attention was left to pytest-kvguard, which has let go of this model")


def find_rotation(hook: AttentionHook) -> Rotation:
    """Read the rotary frequencies off a model and check them against its own keys.

    Raises Unsupported for a model with none, with several, or that pairs channels differently.
    """
    name = type(hook.model).__name__
    found = [b for n, b in hook.model.named_buffers() if n.rsplit(".", 1)[-1] == "inv_freq"]
    rope = getattr(hook.model.config.get_text_config(), "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if len(found) != 1 or kind not in FIXED_KINDS:
        raise Unsupported(
            f"{name} has {len(found)} sets of rotary frequencies of type {kind!r}; keys can be "
            f"moved to cache positions only with one set of type {', '.join(sorted(FIXED_KINDS))}"
        )
    rotation = Rotation(found[0].to(hook.device))
    _check_rotation(hook, rotation)
    return rotation


def _check_rotation(hook: AttentionHook, rotation: Rotation) -> None:
    """Feed one token twice: the first layer's keys may differ by the rotation only."""
    seen: dict[int, Tensor] = {}

    def record(call: AttentionCall) -> Tensor:
        seen[call.layer] = call.key
        return call.query

    ids = torch.ones(1, 2, dtype=torch.long, device=hook.device)
    with hook.uncounted():
        hook.forward(ids, torch.tensor([[0, 9]], device=hook.device), record, last=1)
    first, second = seen[min(seen)][0].unbind(dim=1)  # (Hkv, D) each
    turned = rotation.turn(first, torch.full(first.shape[:1], 9, device=first.device))
    if not torch.allclose(turned.float(), second.float(), rtol=1e-2, atol=1e-2):
        raise Unsupported(
            f"{type(hook.model).__name__} rotates its keys in a way that cannot be undone here; "
            f"use the policy with original positions"
        )
