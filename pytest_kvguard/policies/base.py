"""The contract of a policy: importance, then budget, then selection.

Shapes are written with these letters throughout the package:

    Hq   query heads        T  positions held        R  rows decoded together
    Hkv  key/value heads    W  observed queries      C  slots of a row while decoding
    G    = Hq // Hkv        N  positions kept        D  head size
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.storage.base import Storage

Unit = tuple[range, ...]
"""Token positions that live or die together: a set of spans, disjoint and in order."""

Turn = Callable[[Tensor, Tensor], Tensor]
"""Keys or queries (..., n, D) and positions (..., n) -> the same, rotated that much further."""


@dataclass(frozen=True)
class Passage:
    """Neighbouring positions that come from one part of a prompt."""

    kind: str  # system, instruction, shot, document, question or template
    positions: range


EMPTY = -1
"""The position of a slot that holds nothing."""

ALL_QUERIES = 2**31
"""The `window` of a policy that looks at every query of the prompt."""

Seen = TypeVar("Seen")


@dataclass(frozen=True)
class LayerState:
    """What one attention layer holds of one prompt when its prefill has just finished.

    Keys and queries are as attention used them (after RoPE and any norm).
    """

    keys: Tensor  # (Hkv, T, D)
    values: Tensor  # (Hkv, T, D)
    queries: Tensor  # (Hq, W, D), the last W positions, W <= T
    scaling: float  # what attention multiplies q.k by
    protected: Tensor  # (T,) bool; stays under every policy and is charged to the budget
    units: tuple[Unit, ...] = ()  # in prompt order; positions outside all units belong to none
    unit_kind: str = "shots"  # what they are: shots, as the task marks them, sentences, ...
    attention_sums: Tensor | None = None  # (Hq, T) float32, summed over all T causal queries
    layer: int = 0  # index among the compressible layers
    layers: int = 1  # how many compressible layers there are
    output: Tensor | None = None  # (Hq, D, M) what the output projection makes of each head
    turn: Turn | None = None  # undoes and redoes RoPE; with a policy that needs it
    softcap: float | None = None  # attention squashes logits into (-softcap, softcap)
    sinks: Tensor | None = None  # (Hq,) logits of an attention sink that is no position
    alive: Tensor | None = None  # (T,) bool; others were dropped by an earlier layer for good
    passages: tuple[Passage, ...] = ()  # in order; together they are the whole prompt
    special: Tensor | None = None  # (T,) bool; tokens that stand for no text, such as BOS
    punctuation: Tensor | None = None  # (T,) bool; tokens of punctuation alone

    @property
    def length(self) -> int:
        """Positions held, T."""
        return self.keys.shape[-2]

    @cached_property
    def _seen(self) -> dict[Any, Any]:
        return {}

    def once(self, look: Callable[["LayerState"], Seen]) -> Seen:
        """Return ``look(self)``, computed the first time only and forgotten with the state.

        For what a selection looks at besides the importance, so that a new ratio rates nothing.
        ``look`` must be the same function each time, and no policy may change what it returns.
        """
        if look not in self._seen:
            self._seen[look] = look(self)
        seen: Seen = self._seen[look]
        return seen


Importance = Callable[[LayerState], Tensor]
"""state -> (Hkv, T) float32; higher stays. +inf and -inf are allowed, nan is not."""

Budget = Callable[[LayerState, float], int]
"""state, keep ratio -> N, the positions each head of this layer may keep, 0 <= N <= T."""

Selector = Callable[[Tensor, int, LayerState], Tensor]
"""importance (Hkv, T), N, state -> keep mask (Hkv, T) bool.

At most N per head (of a policy that ``shares_heads``: N on average over the heads), never none,
every protected position among them.
"""


@dataclass(frozen=True)
class DecodeState:
    """One layer of R rows right after a new token was written to it and attended.

    Slots are in no particular order; ``positions`` says what each holds.
    """

    weights: Tensor  # (R, Hq, C) float32 attention of the newest query; 0 where it saw nothing
    sums: Tensor | None  # (R, Hkv, C) float32, prefill sums plus every step's, if accumulated;
    # at empty slots what is left of tokens that went
    positions: Tensor  # (R, Hkv, C) original position of each slot, EMPTY where free
    newest: Tensor  # (R,) original position of the token just attended
    prompt_length: Tensor  # (R,) tokens of the prompt; generated positions are >= this
    budget: Tensor  # (R,) N this layer was given at prefill
    ratio: Tensor  # (R,) keep ratio while decoding, float64
    protected: Tensor | None = None  # (R, Hkv, C) bool, held ones that never go; None: no such
    limit: int | None = None  # every position is below this; None: not known
    # Not a cached_property, whose lock torch.compile refuses (Python 3.11).
    _seen: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def held(self) -> Tensor:
        """Whether each slot holds a token, (R, Hkv, C) bool."""
        return self.once(_held)

    @property
    def generated(self) -> Tensor:
        """Whether each slot holds a generated token, (R, Hkv, C) bool."""
        return self.once(_generated)

    def once(self, look: Callable[["DecodeState"], Seen]) -> Seen:
        """Return ``look(self)``, computed the first time only; see `LayerState.once`."""
        if look not in self._seen:
            self._seen[look] = look(self)
        seen: Seen = self._seen[look]
        return seen


def _held(state: DecodeState) -> Tensor:
    return state.positions != EMPTY


def _generated(state: DecodeState) -> Tensor:
    return state.positions >= state.prompt_length[:, None, None]


@dataclass(frozen=True)
class DecodeEviction:
    """What goes while decoding. After each token, at most ``burst`` slots a head are freed.

    A slot goes when more than ``allowed`` of the ``candidates`` are held: the candidate with the
    lowest importance, of equals the latest. The newest token is never a candidate.
    """

    importance: Callable[[DecodeState], Tensor]  # (R, Hkv, C) float32; higher stays
    candidates: Callable[[DecodeState], Tensor]  # (R, Hkv, C) bool; counted against `allowed`
    allowed: Callable[[DecodeState], Tensor]  # (R,) or (R, Hkv) how many candidates may be held
    slots: Callable[[int, int, float], int]  # budget, new tokens, ratio -> slots a row needs
    accumulate: bool = False  # carry `sums` from the prefill on
    burst: int = 1  # slots a head may free after one token, the least important first
    by_ratio: bool = True  # whether how much is held follows from a keep ratio


@dataclass(frozen=True)
class Reading:
    """Which pages of neighbouring positions a query reads; everything stays held."""

    page: int  # positions in a page
    dense: int  # layers at the start that read everything
    rate: Callable[[Tensor, Tensor, Tensor], Tensor]
    """queries (R, Hq, Q, D), channel-wise min and max of each page's keys (R, Hkv, P, D)
    -> (R, Hq, Q, P) float32; the higher are read."""


Foreign = Callable[[float], Callable[[Any], AbstractContextManager[Any]]]
"""share to keep of what is prefilled -> model -> a block in which its cache is compressed."""

Saves = Literal["positions", "bytes", "reads"]
"""What a keep ratio is a share of: the positions of a prompt that are held, the bytes of its full
cache, or the positions that are read."""


@dataclass(frozen=True)
class Policy:
    """Which positions of the KV cache survive, independent of the keep ratio."""

    name: str
    importance: Importance
    budget: Budget
    select: Selector
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    window: int = 1  # how many of the last queries it looks at; or ALL_QUERIES
    needs_sums: bool = False  # whether it looks at `attention_sums`
    needs_turn: bool = False  # whether it looks at `turn`
    shares_heads: bool = False  # whether heads share the layer's budget unequally
    keeps_units: bool = False  # whether whole units are kept; what is outside them is protected
    narrows: bool = False  # what a layer drops, the layers behind it never see
    foreign: Foreign | None = None  # other people's code that chooses; the rest is not asked
    reuse: int = 1  # this many neighbouring layers share the first one's selection
    rerotate: bool = False  # keys move to their index in the cache (cache positions)
    decode: DecodeEviction | None = None  # None: generated tokens all stay
    decode_ratio: float | None = None  # keep ratio while decoding; None: the prefill's
    stays: Callable[[LayerState], Tensor] | None = None  # (T,) bool; what it protects by itself
    store: Storage | None = None  # None: as the model made it
    read: Reading | None = None  # None: everything held is read
    saves: Saves = "positions"  # what the keep ratio is a share of

    def __post_init__(self) -> None:
        if self.read and (self.store or self.decode):
            raise InvalidArgument(
                f"{self.name}: pages are read of a cache in which everything stays as it is; "
                f"evict, store smaller or read less, one of them"
            )
        if self.store and self.rerotate and self.decode:
            raise InvalidArgument(
                f"{self.name}: keys that are stored as codes cannot be moved while decoding; "
                f"use original positions, or leave the storage out"
            )

    def fixed(self, state: LayerState) -> Tensor:
        """Return what stays whatever its importance, (T,) bool: protected in general, or here."""
        return state.protected if self.stays is None else state.protected | self.stays(state)

    def keep(self, state: LayerState, ratio: float) -> Tensor:
        """Return the mask of the positions to keep, (Hkv, T) bool."""
        return self.select(self.importance(state), self.budget(state, ratio), state)


Modifier = Callable[[Policy], Policy]
"""A policy -> the same with something changed, under a name that says so: ``shotkv|kivi``."""
