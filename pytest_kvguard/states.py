"""Hypothesis strategies: what a layer may hold after its prefill, and while decoding."""

from collections.abc import Callable
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from pytest_kvguard.policies.base import EMPTY, DecodeState, LayerState, Passage, Unit

TEXTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "even": lambda drawn: drawn,
    "peaked": lambda drawn: drawn * 8,  # attention falls on few positions
    "level": lambda drawn: drawn.sign(),  # many ties
    "flat": torch.zeros_like,  # nothing but ties
}


def ratios() -> st.SearchStrategy[float]:
    """Draw keep ratios in (0, 1], 1 and the usual ones often."""
    return st.sampled_from([1.0, 0.75, 0.5, 0.3, 0.25, 0.1]) | st.floats(0.01, 1.0)


@st.composite
def layer_states(
    draw: st.DrawFn,
    *,
    window: int = 48,
    min_units: int = 0,
    max_length: int = 48,
    narrowed: bool = False,
) -> LayerState:
    """Draw a layer's state with the last ``window`` queries, or all of a shorter prompt.

    Lengths cross every boundary from 1 on; keys are float32 or bfloat16, with and without ties;
    units have several spans, leave gaps, or are one giant; any positions may be protected. If
    ``narrowed``, earlier layers may have dropped some that are not.
    """
    length = draw(st.integers(1, max_length))
    heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 4]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    texture = TEXTURES[draw(st.sampled_from(list(TEXTURES)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    drawn = torch.randn(heads * (group + 2), length, 4, generator=generator)
    sizes = [heads * group, heads, heads]
    queries, keys, values = torch.split(texture(drawn).to(dtype), sizes)  # each (heads, T, D)
    protected = torch.zeros(length, dtype=torch.bool)
    protected[draw(st.lists(st.integers(0, length - 1), max_size=min(4, length)))] = True
    layers = draw(st.integers(1, 5))
    alive = torch.rand(length, generator=generator) < draw(st.sampled_from([0.2, 0.6, 1]))
    alive[draw(st.integers(0, length - 1))] = True
    return LayerState(
        keys=keys,
        values=values,
        queries=queries[:, -window:],
        scaling=0.5,
        protected=protected,
        units=draw(_units(length, min_units)),
        attention_sums=_attention_sums(queries, keys, 0.5),
        layer=draw(st.integers(0, layers - 1)),
        layers=layers,
        output=torch.randn(heads * group, 4, 6, generator=generator).to(dtype),
        turn=_turn,
        alive=alive | protected if narrowed else None,
        passages=draw(_passages(length)),
        special=torch.arange(length) == draw(st.integers(-1, length - 1)),
        punctuation=torch.rand(length, generator=generator) < 0.2,
    )


@st.composite
def decode_states(draw: st.DrawFn, *, sums: bool = True, max_slots: int = 10) -> DecodeState:
    """Draw rows right after a token of the prompt or of the answer was attended.

    Slots are in no order, other ones in each head, and some are free, with sums left over from
    what they held; heads hold the same positions or their own; attention has ties or none; any
    of the prompt may be protected. ``sums``: as for a policy that accumulates.
    """
    rows, heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    texture = TEXTURES[draw(st.sampled_from(list(TEXTURES)))]
    alike, slots = draw(st.booleans()), draw(st.integers(1, max_slots))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    prompt = torch.randint(1, 9, (rows,), generator=generator)
    newest = prompt - 1 + torch.randint(0, 10, (rows,), generator=generator)
    positions = _slots(newest, heads, slots, alike, generator)
    seen = positions.repeat_interleave(group, dim=1)  # (R, Hq, C)
    logits = texture(torch.randn(rows, heads * group, int(newest.max()) + 1, generator=generator))
    weights = logits.gather(2, seen.clamp(min=0)).masked_fill(seen == EMPTY, float("-inf"))
    paid = torch.randint(0, draw(st.sampled_from([1, 3, 99])), positions.shape, generator=generator)
    chance = draw(st.sampled_from([0, 0.3, 1]))
    fixed = torch.rand(rows, int(prompt.max()), generator=generator) < chance
    at = positions.clamp(min=0, max=fixed.shape[1] - 1)
    of_prompt = (positions != EMPTY) & (positions < prompt[:, None, None])
    return DecodeState(
        weights=weights.softmax(dim=-1),
        sums=paid.float() if sums else None,
        positions=positions,
        newest=newest,
        prompt_length=prompt,
        budget=torch.randint(1, 9, (rows,), generator=generator),
        ratio=torch.tensor([draw(ratios()) for _ in range(rows)], dtype=torch.float64),
        protected=of_prompt & fixed[:, None].expand(-1, heads, -1).gather(2, at),
    )


def _slots(
    newest: Tensor, heads: int, slots: int, alike: bool, generator: torch.Generator
) -> Tensor:
    """Return positions (R, heads, slots): some of those up to the newest, which is one of them."""
    rows, length = len(newest), int(newest.max()) + 1
    order = torch.rand(rows, 1 if alike else heads, length, generator=generator)
    to_come = torch.arange(length) - newest[:, None, None]  # (R, 1, length)
    order = order.masked_fill(to_come == 0, -1).masked_fill(to_come > 0, 2).argsort(dim=-1)
    held = torch.randint(1, slots + 1, order.shape[:2], generator=generator)[..., None]
    gone = (torch.arange(length) >= held) | (order > newest[:, None, None])
    kept = order.masked_fill(gone, EMPTY)[..., :slots].expand(-1, heads, -1)
    kept = torch.cat([kept, torch.full((rows, heads, slots), EMPTY)], dim=-1)[..., :slots]
    return kept.gather(-1, torch.rand(rows, heads, slots, generator=generator).argsort(dim=-1))


def _turn(keys: Tensor, by: Tensor) -> Tensor:
    """Rotate channel i with channel i + D/2, each pair at its own pace."""
    pairs = keys.shape[-1] // 2
    angle = by.unsqueeze(-1).float() / 10 ** torch.arange(pairs)
    turned = torch.view_as_complex(torch.stack(keys.float().chunk(2, dim=-1), dim=-1))
    turned = turned * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1).to(keys.dtype)


@st.composite
def _passages(draw: st.DrawFn, length: int) -> tuple[Passage, ...]:
    kinds = st.sampled_from(["template", "system", "shot", "document", "question"])
    inner = draw(st.sets(st.integers(1, length), max_size=4)) - {length}
    return tuple(
        Passage(draw(kinds), range(*ends)) for ends in pairwise([0, *sorted(inner), length])
    )


@st.composite
def _units(draw: st.DrawFn, length: int, least: int) -> tuple[Unit, ...]:
    cuts = sorted(draw(st.sets(st.integers(0, length), min_size=2, max_size=9)))
    spans: dict[int, list[range]] = {}
    for start, stop in pairwise(cuts):
        spans.setdefault(draw(st.integers(0, 4)), []).append(range(start, stop))
    spans.pop(0, None)  # these are in no unit
    units = tuple(tuple(unit) for unit in spans.values())
    return units if len(units) >= least else ((range(length),),)


def _attention_sums(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    shared = keys.float().repeat_interleave(len(queries) // len(keys), dim=0)
    logits = queries.float() @ shared.mT * scaling  # (Hq, T, T)
    future = torch.ones_like(logits, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, float("-inf")).softmax(-1).sum(dim=1)
