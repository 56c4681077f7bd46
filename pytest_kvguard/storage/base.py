"""The contract of a storage format: a codec for keys, one for values, and when they encode.

R  rows    Hkv  key/value heads    n  tokens    D  head size
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument


class Codec(Protocol):
    """Turns tokens of a head into codes and back."""

    @property
    def span(self) -> int:
        """How many neighbouring tokens are encoded together."""

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Encode (..., n, D), n a multiple of ``span``, into all there is to store.

        Each part is (..., n / span, *), so that what is encoded together can be told apart.
        """

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Restore (..., n, D) from the parts, in the type of what was encoded."""


@dataclass(frozen=True)
class Plain:
    """Leaves tokens as they are: what an engine does not encode."""

    span: int = 1

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Store (..., n, D) itself."""
        return (tokens,)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return (..., n, D)."""
        return parts[0].to(dtype)


@dataclass(frozen=True)
class Storage:
    """How what a head holds is stored, in order of arrival: the oldest as codes.

    With a ``residual`` the newest tokens stay as they are, and a token is attended before the
    next of the old ones are encoded. Without, each token is encoded as it is written and read
    back from its codes.
    """

    keys: Codec
    values: Codec
    residual: int = 0  # a multiple of either codec's span, not 0 where one is more than 1
    skip: int = 0  # layers at either end whose tokens stay as they are
    params: Mapping[str, Any] = field(  # for reports
        default_factory=lambda: MappingProxyType({}), compare=False
    )

    def __post_init__(self) -> None:
        for what, codec in (("keys", self.keys), ("values", self.values)):
            if self.residual % codec.span or (codec.span > 1 and not self.residual):
                raise InvalidArgument(
                    f"{what} are encoded {codec.span} tokens together, so the residual must be a "
                    f"multiple of {codec.span}, got {self.residual}"
                )

    def of_layer(self, index: int, layers: int) -> "Storage":
        """Say how layer ``index`` of so many is stored; at most half are skipped at either end."""
        skip = min(self.skip, layers // 2)
        if skip <= index < layers - skip:
            return self
        return Storage(Plain(), Plain())

    def coded_keys(self, count: Tensor) -> Tensor:
        """Say how many of ``count`` keys are codes: with a residual, whole multiples of it."""
        return count // self.residual * self.residual if self.residual else count

    def coded_values(self, count: Tensor) -> Tensor:
        """Say how many of ``count`` values are codes: all but the residual."""
        return (count - self.residual).clamp(min=0)
