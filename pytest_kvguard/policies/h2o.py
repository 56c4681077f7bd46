"""H2O: keep heavy hitters, the positions that collected most attention, and the recent ones.

Zhang et al., 2023, https://arxiv.org/abs/2306.14048

importance  attention received from every query so far, not normalised
budget      given; the same for every layer; a share of it for heavy hitters, the rest recent
selection   the recent positions, then the top ones, of each key/value head; after each new token
            the least heavy one that is not recent goes

Differs from the paper: query heads that share a key/value head add up their attention; evicted
positions are freed, not masked; the keep ratio sets heavy hitters and recent positions together,
where the published code sets each as a fraction of the prompt.
"""

from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.parameters import check_share, frozen
from pytest_kvguard.policies.base import DecodeEviction, DecodeState, LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio, share, shares
from pytest_kvguard.policies.evict import rolling_room, rolling_slots, room_for_next
from pytest_kvguard.policies.observe import summed_attention
from pytest_kvguard.policies.recency import favour_latest
from pytest_kvguard.policies.selectors import top_tokens


def h2o(heavy: float = 0.5) -> Policy:
    """Keep heavy hitters, a ``heavy`` share of the budget rounded down, and recent positions."""
    check_share("heavy", heavy)

    def select(importance: Tensor, n: int, state: LayerState) -> Tensor:
        return top_tokens(favour_latest(importance, n - share(n, heavy)), n, state)

    def candidates(state: DecodeState) -> Tensor:
        budget = state.budget.clamp(min=2)[:, None]
        recent = (budget - shares(budget, heavy)).minimum(rolling_room(state))  # (R, Hkv)
        # the next token will be one of the recent, and an old one leaves them
        return state.positions < (state.newest[:, None] + 2 - recent).unsqueeze(-1)

    return Policy(
        "h2o",
        lambda state: summed_attention(state).sum(dim=1),
        keep_ratio,
        select,
        params=frozen(heavy=heavy),
        needs_sums=True,
        decode=DecodeEviction(
            importance=_accumulated,
            candidates=lambda state: state.once(candidates),
            allowed=lambda state: room_for_next(state.once(candidates), state),
            slots=rolling_slots,
            accumulate=True,
        ),
    )


def _accumulated(state: DecodeState) -> Tensor:
    if state.sums is None:
        raise InvalidArgument("h2o goes on from the attention sums of the prompt; pass `sums`")
    return state.sums
