"""One prompt under one cell, decoded step by step: the same rows as in a grid, to look at."""

import torch
from torch import Tensor

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.evicting import EvictingCache
from pytest_kvguard.engine.cache.paged import PagedCache
from pytest_kvguard.engine.cache.quantized import QuantizedCache
from pytest_kvguard.engine.compress import Compressor
from pytest_kvguard.engine.grid import Cell, Prompt
from pytest_kvguard.engine.groups import lone_group
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.own_prefill import OwnPrefills, prefills_alone
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.engine.record import share_held
from pytest_kvguard.engine.requests import Draft, HeldPrompt
from pytest_kvguard.engine.selfcheck import check_faithful
from pytest_kvguard.engine.stack import StackLayer

Slots = DenseCache | EvictingCache | PagedCache | QuantizedCache


class Row:
    """What one cell holds of one prompt, before and after every token that is fed.

    Made by a prefill; what the cell does not keep is let go of. ``most``: new tokens to have room
    for, those of the question that are fed behind the compressed context included.
    """

    def __init__(self, hook: AttentionHook, prompt: Prompt, cell: Cell, most: int) -> None:
        self.hook, self.prompt = hook, prompt
        self.fed = 0  # tokens fed so far
        self.most = most
        check_faithful(hook, prompt.ids)
        policy = cell.policy
        alone = prefills_alone(policy)
        observe = Observe() if alone else Observe(policy.window, policy.needs_sums)
        with hook.open():
            [made] = prefill(hook, [Wanted(prompt.ids[: prompt.compressed])], observe)
            held = HeldPrompt(0, prompt, made)
            nothing = Draft([], torch.empty(0, hook.vocabulary))
            request = Compressor(hook, held, OwnPrefills(hook)).request(nothing, 0, cell)
            self.share = share_held(request.kept, prompt)  # (layers, Hkv) of what is compressed
            group = lone_group(request, most)
            self._batch = Batch(hook, [group], [prompt.fed])
        self._position_bytes = made.stack.position_bytes
        self._layers = [_Layer.of(x, group.caches[x.layer]) for x in made.stack.layers.values()]

    def feed(self, tokens: tuple[int, ...]) -> Tensor:
        """Push the row's next tokens through the model; return the last one's logits, (V,)."""
        with self.hook.open():
            logits = self._batch.feed([tokens], last=1)
        self.fed += len(tokens)
        return logits[0, -1]

    @property
    def length(self) -> int:
        """Tokens that went by: of the prompt before what is fed, and those fed."""
        return self.prompt.fed + self.fed

    @property
    def full_bytes(self) -> int:
        """Bytes of the keys and values of as many tokens, all of them held."""
        sliding = sum(layer.behind(self.length) for layer in self._layers)
        return self._position_bytes * self.length - sliding

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values held, or of the codes that stand for them."""
        return sum(layer.bytes(self.length) for layer in self._layers)

    @property
    def evicted(self) -> int:
        """Slots that were emptied since the prompt was compressed, over all layers and heads."""
        return self._batch.evicted[0]

    @property
    def layers(self) -> list[Tensor]:
        """Positions that each compressible layer holds, (Hkv, C); EMPTY where nothing is."""
        return [layer.positions for layer in self._layers if layer.window is None]


class _Layer:
    """A layer's cache, with what is needed to count its bytes."""

    def __init__(self, cache: Slots, heads: int, token_bytes: int, window: int | None) -> None:
        self.cache, self.heads, self.token_bytes, self.window = cache, heads, token_bytes, window

    @classmethod
    def of(cls, layer: StackLayer, cache: object) -> "_Layer":
        assert isinstance(cache, Slots)  # what rows alone are given
        return cls(cache, layer.keys.shape[1], layer.token_bytes, layer.window)

    @property
    def positions(self) -> Tensor:
        """(Hkv, C), EMPTY where nothing is."""
        return self.cache.positions[0].expand(self.heads, -1)

    def behind(self, length: int) -> int:
        """Bytes of the tokens that a sliding layer holds no more."""
        gone = 0 if self.window is None else max(0, length - self.window + 1)
        return gone * self.heads * self.token_bytes

    def bytes(self, length: int) -> int:
        """Bytes of what the layer holds after ``length`` tokens."""
        if self.window is not None:
            return length * self.heads * self.token_bytes - self.behind(length)
        if (codes := self.cache.bytes) is not None:
            return int(codes[0])
        return int((self.positions >= 0).sum()) * self.token_bytes
