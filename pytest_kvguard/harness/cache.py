"""A compressed cache to look at, step by step, for assertions about caches themselves."""

from collections.abc import Collection

import torch
from torch import Tensor

from pytest_kvguard.engine.grid import Cell, Prompt
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.stepwise import Row
from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.harness.given import Given, prompt_from
from pytest_kvguard.harness.replies import Stopping, decode_with_tags, tail_of
from pytest_kvguard.models import Loaded
from pytest_kvguard.policies.base import EMPTY, Policy
from pytest_kvguard.tasks.base import Protocol
from pytest_kvguard.tasks.units import MARKED


class CompressedCache:
    """What a policy leaves of one prompt's cache, before and after every token that is written.

    It holds, stores, evicts and reads as a cell of a run does. What is fed behind the compressed
    prompt is not among what is held at first: the last token of the prompt, so that an answer is
    read from the compressed cache alone, or the question after a compressed context.
    """

    def __init__(
        self, loaded: Loaded, prompt: Prompt, policy: Policy, ratio: float, max_new_tokens: int
    ) -> None:
        """max_new_tokens: how many there is room for. Raises what compressing for a cell does."""
        self.prompt, self.policy, self.ratio = prompt, policy, ratio
        self.max_new_tokens = max_new_tokens
        self.tokens: list[int] = []  # written so far
        self._loaded = loaded
        cell = Cell(policy, ratio)
        most = len(prompt.tail) + max_new_tokens
        self._row = Row(AttentionHook(loaded.model), prompt, cell, most)

    def __repr__(self) -> str:
        """Say in one line what is held."""
        held, layers = self.held, self._row.layers
        return (
            f"<CompressedCache {self.policy.name} at {self.ratio:g}: {held.mean():.0%} of "
            f"{self.prompt.compressed} tokens ({held.min():.0%} to {held.max():.0%} by head) in "
            f"{len(layers)} layers x {len(layers[0])} heads, {self.bytes} of {self.full_bytes} "
            f"bytes, {len(self.tokens)} new tokens>"
        )

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt; positions from here on are generated."""
        return len(self.prompt.ids)

    @property
    def newest(self) -> int:
        """The position of the token that was fed last."""
        return self._row.length - 1

    @property
    def held(self) -> Tensor:
        """Fraction of what was compressed that was kept, (layers, Hkv) float64.

        With the prompt's last token where that is fed again.
        """
        return self._row.share

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values held now, or of the codes that stand for them."""
        return self._row.bytes

    @property
    def full_bytes(self) -> int:
        """Bytes of the keys and values that the full cache would hold now."""
        return self._row.full_bytes

    @property
    def evicted(self) -> int:
        """Slots that were emptied while decoding, over all layers and heads."""
        return self._row.evicted

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return self._row.layers[0].device

    def positions(self, layer: int, head: int) -> list[int]:
        """Return the positions that a head of a compressible layer holds now, in order."""
        layers = self._row.layers
        if not (0 <= layer < len(layers) and 0 <= head < len(layers[0])):
            raise InvalidArgument(
                f"there is no head {head} in layer {layer}; the model has {len(layers)} "
                f"compressible layers of {len(layers[0])} key/value heads, counted from 0"
            )
        held: list[int] = layers[layer][head].tolist()
        return sorted(at for at in held if at != EMPTY)

    @property
    def over(self) -> bool:
        """Whether the model ended its answer."""
        return bool(self.tokens) and self.tokens[-1] in self._loaded.eos

    @property
    def text(self) -> str:
        """What was written so far, without reasoning trace and end token."""
        return self._stopping(()).text(self.tokens)

    def step(self) -> int:
        """Feed the newest token, or at first what follows the compressed prompt; write the next.

        Returns the token that is written, greedily. It is fed, and so held, one step later. Raises
        InvalidArgument when there is no more room, or the answer is over.
        """
        if self.over:
            raise InvalidArgument(f"the answer is over after {len(self.tokens)} tokens")
        if len(self.tokens) >= self.max_new_tokens:
            raise InvalidArgument(
                f"this cache has room for {self.max_new_tokens} new tokens, and all are written; "
                f"make it with a larger max_new_tokens"
            )
        feed = tuple(self.tokens[-1:]) or self.prompt.tail
        self.tokens.append(int(self._row.feed(feed).argmax()))
        return self.tokens[-1]

    def answer(self, max_new_tokens: int | None = None, stop: tuple[str, ...] = ()) -> str:
        """Step until the answer ends, as in a run; return what a scorer would be given.

        max_new_tokens: end after this many in all; as many as there is room for if None.
        """
        most = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        stopping = self._stopping(stop, most)
        while not self.tokens or not stopping.over(self.tokens):
            self.step()
        return stopping.text(self.tokens)

    def _stopping(self, strings: tuple[str, ...], most: int = 0) -> Stopping:
        readable = decode_with_tags(self._loaded.tokenizer, self._loaded.decode)
        tail = tail_of(self.prompt.ids, readable)
        return Stopping(most, self._loaded.eos, strings, readable, tail)


def compress(
    loaded: Loaded,
    given: Given,
    policy: Policy,
    ratio: float,
    *,
    units: str = MARKED,
    protocol: Protocol = "prompt",
    protect: Collection[str] = (),
    max_new_tokens: int = 256,
) -> CompressedCache:
    """Prefill a prompt and compress it, as a run does for a cell.

    given: a text, messages, parts or a sample; units: what a policy that keeps units keeps whole;
    protocol: compress the whole prompt, or its context before the question is seen; protect: kinds
    of parts that stay. Raises InvalidArgument for what is no prompt, and what compressing does.
    """
    if max_new_tokens < 1:
        raise InvalidArgument(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    prompt = prompt_from(
        given, loaded.tokenizer, ahead=protocol == "context", protect=protect, units=units
    )
    return CompressedCache(loaded, prompt, policy, ratio, max_new_tokens)
