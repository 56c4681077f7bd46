"""The KV caches of a wave of prompts: one stack of keys and values a layer, a slot a prompt.

They stay where they lie while every policy chooses from them: what a row keeps of its prompt is a
set of places in the stack.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pytest_kvguard.engine.attention import AttentionCall, Scoring
from pytest_kvguard.engine.grid import About
from pytest_kvguard.policies.base import LayerState, Turn

PAGE_OF_KEYS = 16
"""A stack's length is a multiple of this on an accelerator, whose kernels read aligned biases."""


@dataclass(frozen=True)
class StackLayer:
    """One layer's keys and values of P prompts, each in position order, padded to T."""

    layer: int  # the model's index of it
    keys: Tensor  # (P, Hkv, T, D), rotated
    values: Tensor  # (P, Hkv, T, D)
    scoring: Scoring
    window: int | None  # None: full attention, hence compressible
    output: Tensor | None = None  # (Hq, D, M)

    @property
    def token_bytes(self) -> int:
        """Bytes of the key and the value of one position in one head."""
        size = self.keys.shape[-1] + self.values.shape[-1]
        return size * self.keys.element_size()


@dataclass
class Stack:
    """The KV caches of ``slots`` prompts of at most ``length`` tokens."""

    slots: int
    length: int
    layers: dict[int, StackLayer] = field(default_factory=dict)  # by the model's index, ascending

    @property
    def compressible(self) -> tuple[StackLayer, ...]:
        """The layers with full attention; the others are left alone."""
        return tuple(layer for layer in self.layers.values() if layer.window is None)

    @property
    def position_bytes(self) -> int:
        """Bytes of one position in all layers and heads."""
        return sum(layer.token_bytes * layer.keys.shape[1] for layer in self.layers.values())

    def layer(self, call: AttentionCall) -> StackLayer:
        """Return the layer of a call; its room is made when it is first seen."""
        if call.layer not in self.layers:
            self.layers[call.layer] = StackLayer(
                call.layer,
                self._room(call.key),
                self._room(call.value),
                call.scoring,
                call.window,
                call.output,
            )
        return self.layers[call.layer]

    def adopt(self, prefill: "Prefill", slot: int) -> None:
        """Copy what a prompt begins with into a slot."""
        length = len(prefill.ids)
        for index, layer in prefill.stack.layers.items():
            if index not in self.layers:
                keys, values = self._room(layer.keys), self._room(layer.values)
                self.layers[index] = replace(layer, keys=keys, values=values)
            own = self.layers[index]
            if own is layer and slot == prefill.slot:
                continue
            own.keys[slot, :, :length] = layer.keys[prefill.slot, :, :length]
            own.values[slot, :, :length] = layer.values[prefill.slot, :, :length]

    def _room(self, like: Tensor) -> Tensor:
        """Make room for keys or values like some (*, Hkv, *, D)."""
        length = self.length
        if like.is_cuda:
            length = -(-length // PAGE_OF_KEYS) * PAGE_OF_KEYS
        # What is never written must hold numbers: attention weight 0 times nan would be nan.
        return like.new_zeros(self.slots, like.shape[1], length, like.shape[-1])


@dataclass(frozen=True)
class Prefill:
    """A prompt, or its beginning, as a model holds it before anything is evicted."""

    ids: tuple[int, ...]
    stack: Stack
    slot: int  # in the stack
    queries: dict[int, Tensor] = field(default_factory=dict)  # by layer, (Hq, min(W, T), D)
    sums: dict[int, Tensor] = field(default_factory=dict)  # by layer, (Hq, T) float32; if asked for

    def alone(self) -> "Prefill":
        """Return the same in a stack of its own, so that this one can be let go of."""
        stack = Stack(1, len(self.ids))
        stack.adopt(self, 0)
        return Prefill(self.ids, stack, 0, self.queries, self.sums)

    def states(
        self, about: About, protected: Tensor, turn: Turn | None = None
    ) -> tuple[LayerState, ...]:
        """Show each compressible layer as policies see it. protected: (T,) bool."""
        layers, length = self.stack.compressible, len(self.ids)
        known: dict[torch.device, Known] = {}  # layers may lie on several devices
        states = []
        for index, layer in enumerate(layers):
            device = layer.keys.device
            if device not in known:
                known[device] = Known.of(about, protected, device)
            states.append(
                known[device].state(
                    layer,
                    layer.keys[self.slot, :, :length],
                    layer.values[self.slot, :, :length],
                    self.queries[layer.layer],
                    at=(index, len(layers)),
                    sums=self.sums.get(layer.layer),
                    turn=turn,
                )
            )
        return tuple(states)


@dataclass(frozen=True)
class Known:
    """What is known of a prompt's positions, on one device."""

    about: About
    protected: Tensor  # (T,) bool
    special: Tensor  # (T,) bool
    punctuation: Tensor  # (T,) bool

    @classmethod
    def of(cls, about: About, protected: Tensor, device: torch.device) -> "Known":
        """Mark on a device what a prompt's text says of its positions."""
        length = len(protected)
        marks = (_marked(at, length).to(device) for at in (about.special, about.punctuation))
        return cls(about, protected.to(device), *marks)

    def state(
        self,
        layer: StackLayer | AttentionCall,
        keys: Tensor,
        values: Tensor,
        queries: Tensor,
        *,
        at: tuple[int, int],
        sums: Tensor | None = None,
        turn: Turn | None = None,
        alive: Tensor | None = None,
    ) -> LayerState:
        """Show a compressible layer as policies see it.

        keys, values: (Hkv, T, D); queries: (Hq, W, D); alive: (T,) bool; at: its index among the
        compressible layers, and how many there are.
        """
        return LayerState(
            keys=keys,
            values=values,
            queries=queries,
            scaling=layer.scoring.scaling,
            softcap=layer.scoring.softcap,
            sinks=layer.scoring.sinks,
            protected=self.protected,
            units=self.about.units,
            unit_kind=self.about.unit_kind,
            attention_sums=sums,
            layer=at[0],
            layers=at[1],
            output=layer.output,
            turn=turn,
            alive=alive,
            passages=self.about.passages,
            special=self.special,
            punctuation=self.punctuation,
        )


def _marked(positions: Sequence[int], length: int) -> Tensor:
    """Mark the positions that lie within ``length``, (length,) bool."""
    mask = torch.zeros(length, dtype=torch.bool)
    mask[[at for at in positions if at < length]] = True
    return mask
