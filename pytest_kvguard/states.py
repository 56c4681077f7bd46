"""Hypothesis strategies: what a layer may hold after its prefill, and while decoding."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from pytest_kvguard.policies.base import ALL_QUERIES, EMPTY, DecodeState, LayerState, Passage, Unit

TEXTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "even": lambda drawn: drawn,
    "peaked": lambda drawn: drawn * 8,  # attention falls on few positions
    "level": lambda drawn: drawn.sign(),  # many ties
    "flat": torch.zeros_like,  # nothing but ties
    "gaps": lambda drawn: drawn * (drawn[..., :1] > 0),  # some vectors are zero, some are not
    "outliers": lambda drawn: drawn * (1 + 30 * (drawn[..., :1] > 1.5)),  # some are far longer
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

DEEP = 32
"""Layers of a model that is not small."""


def ratios() -> st.SearchStrategy[float]:
    """Draw keep ratios in (0, 1]: the usual ones often, and those close to either end."""
    usual = st.sampled_from([1.0, 0.75, 0.5, 0.3, 0.25, 0.1])
    return usual | st.floats(0.01, 1.0) | st.sampled_from([0.99, 0.95, 0.9, 0.05])


def layer_state(
    length: int,
    *,
    seed: int,
    heads: int = 2,
    group: int = 2,
    size: int = 4,
    dtype: torch.dtype = torch.float32,
    texture: str = "even",
    protected: Sequence[int] = (),
    units: tuple[Unit, ...] = (),
    layer: int = 0,
    layers: int = 1,
    passages: tuple[Passage, ...] = (),
    special: Sequence[int] = (),
    punctuation: float = 0.2,
    alive: float | None = None,
    heads_last: bool = False,
) -> LayerState:
    """Make what a layer of ``layers`` holds of a prompt, with everything that can be recorded.

    ``size``: channels of a head, even. ``punctuation`` and ``alive``: the share of positions that
    are; None if no layer drops any, and what is protected is always alive. ``heads_last``: keys
    and values lie in memory as projections make them, position by position.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [heads * group, heads, heads]
    drawn = torch.randn(sum(sizes), length, size, generator=generator)
    drawn = TEXTURES[texture](drawn).to(dtype)
    if heads_last:
        drawn = drawn.transpose(0, 1).contiguous().transpose(0, 1)
    queries, keys, values = torch.split(drawn, sizes)  # each (heads, T, D)
    scaling = size**-0.5
    fixed = torch.zeros(length, dtype=torch.bool)
    fixed[list(protected)] = True
    chance = torch.rand(length, generator=generator)
    staying = chance < max(
        1 if alive is None else alive, float(chance.min()) + 1e-6
    )  # one at least
    return LayerState(
        keys=keys,
        values=values,
        queries=queries,
        scaling=scaling,
        protected=fixed,
        units=units,
        attention_sums=_attention_sums(queries, keys, scaling),
        layer=layer,
        layers=layers,
        output=torch.randn(heads * group, size, size + 2, generator=generator).to(dtype),
        turn=_turn,
        alive=None if alive is None else staying | fixed,
        passages=passages,
        special=torch.isin(torch.arange(length), torch.tensor(list(special), dtype=torch.long)),
        punctuation=torch.rand(length, generator=generator) < punctuation,
    )


@st.composite
def layer_states(
    draw: st.DrawFn,
    *,
    window: int = ALL_QUERIES,
    min_units: int = 0,
    max_length: int = 48,
    narrowed: bool = False,
) -> LayerState:
    """Draw a layer's state with the last ``window`` queries, or all of a shorter prompt.

    Lengths cross every boundary from 1 on. Keys are of any type a
    model runs in, with ties, zeros, outliers or none of these; layers are first, last or between,
    of few or many; units have one span or several, leave gaps, are single positions or one giant;
    any positions may be protected, the last one often. If ``narrowed``, earlier layers may have
    dropped some that are not.
    """
    length = draw(st.integers(1, max_length))
    layers = DEEP if draw(_seldom(6)) else draw(st.integers(1, 5))
    position, before_end = st.integers(0, length - 1), st.integers(0, layers - 1)
    alive = draw(st.sampled_from([0.2, 0.6, 1])) if narrowed else None
    state = layer_state(
        length,
        seed=draw(st.integers(0, 2**16)),
        heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 3, 4])),
        size=draw(st.sampled_from([4, 2, 8])),
        dtype=draw(st.sampled_from(DTYPES)),
        texture=draw(st.sampled_from(list(TEXTURES))),
        protected=draw(_protected(length)),
        units=draw(_units(length, min_units)),
        layer=draw(st.sampled_from([0, layers - 1]) | before_end),
        layers=layers,
        passages=draw(st.just(()) | _passages(length)),
        special=draw(st.lists(position, max_size=min(3, length))),
        punctuation=draw(st.sampled_from([0.2, 0, 1])),
        alive=alive,
        heads_last=draw(st.booleans()),
    )
    return recorded(state, window=window)


def recorded(state: LayerState, *, window: int, sums: bool = True, turn: bool = True) -> LayerState:
    """Return the state as it is where the prefill recorded no more than this."""
    return replace(
        state,
        queries=state.queries[:, -window:],
        attention_sums=state.attention_sums if sums else None,
        turn=state.turn if turn else None,
    )


def decode_state(
    *,
    seed: int,
    ratios: Sequence[float],
    heads: int = 2,
    group: int = 2,
    slots: int = 10,
    full: bool = False,
    texture: str = "even",
    alike: bool = False,
    tokens: int = 10,
    far: int = 1,
    paid: int = 99,
    protected: float | None = 0.3,
    sums: bool = True,
) -> DecodeState:
    """Make a row for each of the ``ratios``, after a token of the prompt or answer was attended.

    ``full``: every slot is held, if there are tokens for it; ``alike``: heads hold the same;
    ``tokens``: most that an answer has, beside ``far``; ``paid``: how many different sums there
    are; ``protected``: the share of the prompt that is.
    """
    rows = len(ratios)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(1, 9, (rows,), generator=generator)
    newest = prompt - 1 + torch.randint(0, tokens, (rows,), generator=generator)
    newest = newest + torch.randint(0, far, (rows,), generator=generator)
    positions = _slots(newest, heads, slots, alike, full, generator)
    seen = positions.repeat_interleave(group, dim=1)  # (R, Hq, C)
    logits = torch.randn(rows, heads * group, int(newest.max()) + 1, generator=generator)
    logits = TEXTURES[texture](logits).gather(2, seen.clamp(min=0))
    levels = torch.randint(0, paid, positions.shape, generator=generator)
    fixed = torch.rand(rows, int(prompt.max()), generator=generator) < (protected or 0)
    at = positions.clamp(min=0, max=fixed.shape[1] - 1)
    of_prompt = (positions != EMPTY) & (positions < prompt[:, None, None])
    staying = of_prompt & fixed[:, None].expand(-1, heads, -1).gather(2, at)
    return DecodeState(
        weights=logits.masked_fill(seen == EMPTY, float("-inf")).softmax(dim=-1),
        sums=levels.float() if sums else None,
        positions=positions,
        newest=newest,
        prompt_length=prompt,
        budget=torch.randint(1, 9, (rows,), generator=generator),
        ratio=torch.tensor(ratios, dtype=torch.float64),
        protected=None if protected is None else staying,
    )


@st.composite
def decode_states(
    draw: st.DrawFn, *, sums: bool = True, max_slots: int = 10, far: int = 50
) -> DecodeState:
    """Draw rows right after a token of the prompt or of the answer was attended.

    Slots are in no order, other ones in each head, and some are free, with sums left over from
    what they held; heads hold the same positions or their own; attention has ties or none; any
    of the prompt may be protected; most answers are short, some up to ``far`` tokens longer.
    ``sums``: as for a policy that accumulates.
    """
    slots, long = draw(st.integers(1, max_slots)), draw(_seldom(4))
    return decode_state(
        seed=draw(st.integers(0, 2**16)),
        ratios=draw(st.lists(ratios(), min_size=1, max_size=3)),
        heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 4])),
        slots=4 * slots if long else slots,  # an answer that has come far, in a cache that holds it
        texture=draw(st.sampled_from(list(TEXTURES))),
        full=draw(_seldom(4)),
        alike=draw(st.booleans()),
        far=far if long else 1,
        paid=draw(st.sampled_from([1, 3, 99])),
        protected=draw(st.sampled_from([0, 0.3, 1, None])),
        sums=sums,
    )


def _seldom(times: int) -> st.SearchStrategy[bool]:
    """Draw True one of so many times."""
    return st.integers(1, times).map(lambda drawn: drawn == times)


def _slots(
    newest: Tensor, heads: int, slots: int, alike: bool, full: bool, generator: torch.Generator
) -> Tensor:
    """Return positions (R, heads, slots): some of those up to the newest, which is one of them."""
    rows, length = len(newest), int(newest.max()) + 1
    order = torch.rand(rows, 1 if alike else heads, length, generator=generator)
    to_come = torch.arange(length) - newest[:, None, None]  # (R, 1, length)
    order = order.masked_fill(to_come == 0, -1).masked_fill(to_come > 0, 2).argsort(dim=-1)
    held = torch.randint(slots if full else 1, slots + 1, order.shape[:2], generator=generator)[
        ..., None
    ]
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
def _protected(draw: st.DrawFn, length: int) -> list[int]:
    """Draw a few anywhere; often with the last, which is fed again; seldom nearly all."""
    at = st.integers(0, length - 1)
    few = draw(st.lists(at, max_size=min(4, length)))
    if draw(_seldom(8)):
        gone = {draw(at), draw(at)} - {length - 1}
        return [position for position in range(length) if position not in gone]
    return [*few, length - 1] if draw(st.booleans()) else few


@st.composite
def _passages(draw: st.DrawFn, length: int) -> tuple[Passage, ...]:
    kinds = st.sampled_from(["template", "system", "shot", "document", "question"])
    inner = draw(st.sets(st.integers(1, length), max_size=4)) - {length}
    return tuple(
        Passage(draw(kinds), range(*ends)) for ends in pairwise([0, *sorted(inner), length])
    )


@st.composite
def _units(draw: st.DrawFn, length: int, least: int) -> tuple[Unit, ...]:
    if draw(_seldom(6)):  # every position on its own, but perhaps the last
        return tuple((range(at, at + 1),) for at in range(max(1, length - draw(st.integers(0, 1)))))
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
