"""Fair split: every part of a prompt keeps the same share of its tokens.

Chen et al., 2025 (The Pitfalls of KV Cache Compression), https://arxiv.org/abs/2510.00231

importance  the policy's own
budget      the policy's own
selection   the policy's own inside each part, which gets a share of the budget by its length;
            protected positions are charged to the share of their part, and where they take more
            than it the other parts share what is left

Differs from the paper: any number of parts, not two; what rounding leaves over goes to the largest
remainders, not to the later part; importance is not made local, so the queries that vote are still
those at the end of the prompt, and only rank the positions of a part among themselves. Tokens of
the chat template belong to the part before them, the first ones to the part behind.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies.base import LayerState, Modifier, Policy, Selector
from pytest_kvguard.policies.budgets import fair_shares
from pytest_kvguard.policies.modify import modified


def fair() -> Modifier:
    """Keep the same share of every part of the prompt.

    The modifier raises InvalidArgument for a policy that keeps units whole, which cannot be cut
    to a share, and for one whose whitelist comes first.
    """

    def modify(policy: Policy) -> Policy:
        if policy.keeps_units:
            raise InvalidArgument(
                f"{policy.name} keeps whole units and fair gives each part of a prompt a number "
                f"of tokens; use a policy that keeps tokens, such as snapkv|fair"
            )
        if policy.stays is not None:
            raise InvalidArgument(
                f"{policy.name}: what must stay is charged to the share of its part, which fair "
                f"must know of; write fair first, as in snapkv|fair|boundary"
            )
        return modified(policy, "fair", {}, select=in_each_part(policy.select))

    return modify


def in_each_part(select: Selector) -> Selector:
    """Return a selector that applies ``select`` to each part of a prompt with its fair share."""

    def fairly(importance: Tensor, n: int, state: LayerState) -> Tensor:
        parts = parts_of(state)
        fixed = [int(state.protected[part].sum()) for part in parts]
        sizes = [part.stop - part.start for part in parts]
        mask = torch.zeros_like(importance, dtype=torch.bool)
        rooms = fair_shares(n, sizes, fixed)
        for part, room, only in zip(parts, rooms, state.once(_parts), strict=True):
            if room:
                mask[:, part] = select(importance[:, part], room, only)
        return mask

    return fairly


def parts_of(state: LayerState) -> list[slice]:
    """Return the parts of a prompt that share the budget; together they are all of it."""
    starts = [p.positions.start for p in state.passages if p.kind != "template"]
    edges = [0, *starts[1:], state.length]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _parts(state: LayerState) -> list[LayerState]:
    return [_only(state, part) for part in parts_of(state)]


def _only(state: LayerState, part: slice) -> LayerState:
    """Return a state as if the part were the whole prompt."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[..., part]

    return replace(
        state,
        keys=state.keys[:, part],
        values=state.values[:, part],
        queries=state.queries[:, -(part.stop - part.start) :],
        protected=state.protected[part],
        units=(),
        passages=(),
        attention_sums=cut(state.attention_sums),
        alive=cut(state.alive),
        special=cut(state.special),
        punctuation=cut(state.punctuation),
    )
