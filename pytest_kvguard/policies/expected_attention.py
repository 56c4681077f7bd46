"""Expected attention: keep what queries still to come are expected to attend to.

Devoto et al., 2025, https://arxiv.org/abs/2510.00636

importance  queries to come are taken for normal, with the mean m and covariance S that the
            prompt's queries had before rotation; both are turned by the mean rotation of the next
            `future` positions; the softmax of m.k + k.S.k / 2, with scaled keys, is averaged over
            the query heads of a key/value head and multiplied by the norm of the value
budget      given; the same for every layer
selection   the top positions of each key/value head; the first `sinks` stay before any other

Differs from the paper: the norm is the value's own, as in the published code, not that of what
the output projection makes of it; heads do not compete for the budget; nothing is evicted while
decoding. The sinks count neither among the queries nor in the softmax, as in the published code.
"""

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.parameters import check_count, frozen
from pytest_kvguard.policies.base import ALL_QUERIES, LayerState, Policy, Turn
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.selectors import top_tokens


def expected_attention(future: int = 512, sinks: int = 4) -> Policy:
    """Keep what the next ``future`` queries are expected to attend to, and ``sinks`` in front."""
    check_count("future", future)
    check_count("sinks", sinks, least=0)

    def importance(state: LayerState) -> Tensor:
        rated = torch.full_like(state.keys[..., 0], float("inf"), dtype=torch.float32)  # (Hkv, T)
        if state.length > sinks:
            rated[:, sinks:] = _expected(state, sinks, future)
        return rated

    return Policy(
        "expected_attention",
        importance,
        keep_ratio,
        top_tokens,
        params=frozen(future=future, sinks=sinks),
        window=ALL_QUERIES,
        needs_turn=True,
    )


def _expected(state: LayerState, sinks: int, future: int) -> Tensor:
    """Rate the positions behind the sinks, (Hkv, T - sinks)."""
    turn = _turn_of(state)
    mean, covariance = _queries_to_come(state, turn, sinks, future)
    heads, group = state.keys.shape[0], len(mean) // state.keys.shape[0]
    keys = state.keys[:, sinks:].float() * state.scaling
    shared = keys.repeat_interleave(group, dim=0)  # (Hq, n, D)
    logits = (shared @ mean.unsqueeze(-1)).squeeze(-1)
    logits = logits + ((shared @ covariance) * shared).sum(dim=-1) / 2  # log of the mean of exp
    attention = logits.softmax(dim=-1).unflatten(0, (heads, group)).mean(dim=1)
    return attention * state.values[:, sinks:].float().norm(dim=-1)


def _queries_to_come(
    state: LayerState, turn: Turn, sinks: int, future: int
) -> tuple[Tensor, Tensor]:
    """Return mean (Hq, D) and covariance (Hq, D, D) of the queries at the next positions."""
    place = torch.arange(sinks, state.length, device=state.keys.device)
    rotated = state.queries[:, sinks:].float()
    queries = turn(rotated, -place.expand(len(rotated), -1))  # as they were before RoPE
    mean = queries.mean(dim=1, keepdim=True)
    centred = queries - mean
    covariance = centred.mT @ centred / queries.shape[1]
    rotation = _mean_rotation(turn, state.length, future, queries)
    return (mean @ rotation).squeeze(1), rotation.mT @ covariance @ rotation


def _mean_rotation(turn: Turn, start: int, count: int, like: Tensor) -> Tensor:
    """Return the rotation of rows, averaged over ``count`` positions from ``start`` on, (D, D)."""
    size = like.shape[-1]
    axes = torch.eye(size, device=like.device).expand(count, -1, -1)
    place = torch.arange(start, start + count, device=like.device)
    return turn(axes, place.unsqueeze(-1).expand(-1, size)).mean(dim=0)


def _turn_of(state: LayerState) -> Turn:
    if state.turn is None:
        raise InvalidArgument(
            "expected attention turns queries to other positions; set the policy's `needs_turn` "
            "to True and pass `turn`"
        )
    if state.queries.shape[-2] != state.length:
        raise InvalidArgument(
            f"expected attention looks at every query, but {state.queries.shape[-2]} of "
            f"{state.length} were recorded; set the policy's `window` to ALL_QUERIES"
        )
    return state.turn
