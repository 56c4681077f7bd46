"""Run a prompt through the model once and keep all that any policy may look at."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kvguard.errors import Unsupported
from pytest_kvguard.kv.attention import attend, attend_causally, column_sums, visible
from pytest_kvguard.kv.seam import Seam, Step
from pytest_kvguard.policies.base import LayerState, Passage, Turn, Unit


@dataclass(frozen=True)
class Observe:
    """What a prefill records for the policies that follow."""

    window: int = 1  # how many of the last queries
    sums: bool = False  # whether attention is summed per key over all queries


@dataclass(frozen=True)
class About:
    """What is known of a prompt's tokens beside their ids; positions."""

    units: tuple[Unit, ...] = ()
    unit_kind: str = "shots"  # what the units are
    passages: tuple[Passage, ...] = ()
    special: tuple[int, ...] = ()
    punctuation: tuple[int, ...] = ()


UNKNOWN = About()
"""Nothing is known beside the ids."""


@dataclass(frozen=True)
class HeldLayer:
    """One layer's keys and values of one prompt, in position order."""

    layer: int  # the model's index of it
    keys: Tensor  # (Hkv, T, D), rotated
    values: Tensor  # (Hkv, T, D)
    queries: Tensor  # (Hq, min(W, T), D), rotated
    sums: Tensor | None  # (Hq, T) float32
    scaling: float
    window: int | None  # None: full attention, hence compressible
    output: Tensor | None = None  # (Hq, D, M)


@dataclass(frozen=True)
class Prefill:
    """A prompt, or the beginning of one, as a model holds it before anything is evicted."""

    ids: tuple[int, ...]
    layers: tuple[HeldLayer, ...]

    @property
    def compressible(self) -> tuple[HeldLayer, ...]:
        """The layers with full attention; the others are left alone."""
        return tuple(layer for layer in self.layers if layer.window is None)

    def states(
        self, about: About, protected: Tensor, turn: Turn | None = None
    ) -> tuple[LayerState, ...]:
        """Show each compressible layer as policies see it. protected: (T,) bool."""
        layers = self.compressible
        return tuple(
            state_of(layer, index, len(layers), about, protected, turn)
            for index, layer in enumerate(layers)
        )


def state_of(
    layer: HeldLayer,
    index: int,
    layers: int,
    about: About,
    protected: Tensor,
    turn: Turn | None = None,
    alive: Tensor | None = None,
) -> LayerState:
    """Show one of the compressible ``layers`` as policies see it. protected, alive: (T,) bool."""
    length, device = layer.keys.shape[1], layer.keys.device
    return LayerState(
        keys=layer.keys,
        values=layer.values,
        queries=layer.queries,
        scaling=layer.scaling,
        protected=protected,
        units=about.units,
        unit_kind=about.unit_kind,
        attention_sums=layer.sums,
        layer=index,
        layers=layers,
        output=layer.output,
        turn=turn,
        alive=alive,
        passages=about.passages,
        special=marked(about.special, length, device),
        punctuation=marked(about.punctuation, length, device),
    )


def prefill(
    seam: Seam, ids: Sequence[int], observe: Observe, after: Prefill | None = None
) -> Prefill:
    """Run one prompt through the model, without padding and on its own.

    With ``after``, only the tokens that follow it are run: prompts that share a context share
    its prefill. Raises Unsupported when no layer of the model can be compressed.
    """
    done = len(after.ids) if after else 0
    new = torch.tensor([list(ids[done:])], device=seam.device)
    positions = torch.arange(done, len(ids), device=seam.device)
    before = {layer.layer: layer for layer in after.layers} if after else {}
    layers: dict[int, HeldLayer] = {}

    def record(step: Step) -> Tensor:
        layers[step.layer], seen = _extend(before.get(step.layer), step, positions, observe)
        return seen

    seam.forward(new, positions[None], record, last=1)
    result = Prefill(tuple(ids), tuple(layers[index] for index in sorted(layers)))
    if not result.compressible:
        what = "only sliding attention" if layers else "no attention that can be observed"
        raise Unsupported(
            f"{type(seam.model).__name__} has {what}, so there is nothing to compress; "
            f"use a model with full-attention layers that supports attn_implementation='sdpa'"
        )
    return result


def _extend(
    held: HeldLayer | None, step: Step, positions: Tensor, observe: Observe
) -> tuple[HeldLayer, Tensor]:
    """Add new tokens to a layer; also return what they see, (1, Hq, Q, D)."""
    queries, sums = step.query[0], None
    keys, values = step.key[0].contiguous(), step.value[0].contiguous()  # to be picked from
    if held is not None:
        keys = torch.cat([held.keys, keys], dim=1)
        values = torch.cat([held.values, values], dim=1)
        queries = torch.cat([held.queries, queries], dim=1)
    if observe.sums and step.window is None:
        sums = column_sums(step.query[0], keys, step.scaling)
        if held is not None and held.sums is not None:
            sums[:, : held.sums.shape[1]] += held.sums
    if held is None and step.window is None:
        seen = attend_causally(step.query, step.key, step.value, step.scaling)
    else:
        every = torch.arange(keys.shape[1], device=keys.device)
        mask = visible(every, positions, step.window)[None, None]
        seen = attend(step.query, keys[None], values[None], mask, step.scaling)
    layer = HeldLayer(
        layer=step.layer,
        keys=keys,
        values=values,
        queries=queries[:, -observe.window :].clone(),
        sums=sums,
        scaling=step.scaling,
        window=step.window,
        output=step.output,
    )
    return layer, seen


def marked(positions: Sequence[int], length: int, device: torch.device) -> Tensor:
    """Mark the positions that lie within ``length``, (length,) bool."""
    mask = torch.zeros(length, dtype=torch.bool, device=device)
    mask[[at for at in positions if at < length]] = True
    return mask
