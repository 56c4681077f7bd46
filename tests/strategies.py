"""States to test policies on: made by hand, and drawn."""

import torch
from hypothesis import strategies as st

from pytest_kvguard.policies.base import EMPTY, DecodeState, LayerState, Unit


def a_state(
    length: int,
    *,
    heads: int = 2,
    group: int = 2,
    window: int | None = None,
    protected: tuple[int, ...] = (),
    units: tuple[Unit, ...] = (),
    layer: int = 0,
    layers: int = 1,
    special: tuple[int, ...] = (0,),
    punctuation: tuple[int, ...] = (3, 11, 12, 29),
    seed: int = 0,
) -> LayerState:
    """Make a state without ties; ``window`` None observes every query."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(heads * group, length, 4, generator=generator)
    keys = torch.randn(heads, length, 4, generator=generator)
    return LayerState(
        keys=keys,
        values=torch.randn(heads, length, 4, generator=generator),
        queries=queries if window is None else queries[:, -window:],
        scaling=0.7,
        protected=marked(protected, length),
        units=units,
        attention_sums=torch.rand(heads * group, length, generator=generator),
        layer=layer,
        layers=layers,
        output=torch.randn(heads * group, 4, 6, generator=generator),
        turn=turned,
        special=marked(special, length),
        punctuation=marked(punctuation, length),
    )


def marked(positions: tuple[int, ...], length: int) -> torch.Tensor:
    mask = torch.zeros(length, dtype=torch.bool)
    mask[[at for at in positions if at < length]] = True
    return mask


PACES = (1.0, 0.1)
"""How fast the pairs of channels (0, 2) and (1, 3) turn, in radians a position."""


def turned(vectors: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    pairs = torch.complex(*vectors.float().chunk(2, dim=-1))
    pairs = pairs * torch.exp(1j * by.unsqueeze(-1) * torch.tensor(PACES))
    return torch.cat([pairs.real, pairs.imag], dim=-1).to(vectors.dtype)


@st.composite
def decode_states(draw: st.DrawFn) -> DecodeState:
    """Draw slots in no order, some free, with many equal sums."""
    rows, heads, slots = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shuffled = torch.rand(rows, heads, 12, generator=generator).argsort(-1)[..., :slots]
    free = torch.rand(rows, heads, slots, generator=generator) < draw(st.sampled_from([0, 0.4, 1]))
    levels = torch.randint(
        0, draw(st.sampled_from([1, 3])), (rows, heads, slots), generator=generator
    )
    return DecodeState(
        weights=torch.rand(rows, heads * 2, slots, generator=generator),
        sums=levels.float(),
        positions=shuffled.masked_fill(free, EMPTY),
        newest=shuffled[:, 0, 0],
        prompt_length=torch.randint(1, 12, (rows,), generator=generator),
        budget=torch.randint(1, 8, (rows,), generator=generator),
        ratio=torch.full((rows,), 0.5, dtype=torch.float64),
    )
