"""VATP: H2O that also asks how large a value is.

Guo et al., 2024, https://arxiv.org/abs/2406.12335

importance  attention received from every query of the prompt, times the L1 norm of the value;
            the first `sinks` positions come before all others
budget      given; the same for every layer; a share of it for important positions, the rest
            recent
selection   the recent positions, then the top ones, of each key/value head

Differs from the paper: only the prompt is compressed; while decoding everything new stays, since
what is evicted then is chosen without sight of the values; query heads that share a key/value
head add up their attention; the host is H2O, never Scissorhands; evicted positions are freed, not
masked.
"""

from torch import Tensor

from pytest_kvguard.parameters import check_count, check_share, frozen
from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio, share
from pytest_kvguard.policies.observe import summed_attention
from pytest_kvguard.policies.recency import favour_earliest, favour_latest
from pytest_kvguard.policies.selectors import top_tokens


def vatp(heavy: float = 0.5, sinks: int = 20) -> Policy:
    """Keep what H2O keeps, attention weighed by the size of the value.

    A ``heavy`` share of the budget, rounded down, goes to the ``sinks`` and other important
    positions.
    """
    check_share("heavy", heavy)
    check_count("sinks", sinks, least=0)

    def importance(state: LayerState) -> Tensor:
        sizes = state.values.float().abs().sum(dim=-1)
        return favour_earliest(summed_attention(state).sum(dim=1) * sizes, sinks)

    def select(importance: Tensor, n: int, state: LayerState) -> Tensor:
        return top_tokens(favour_latest(importance, n - share(n, heavy)), n, state)

    return Policy(
        "vatp",
        importance,
        keep_ratio,
        select,
        params=frozen(heavy=heavy, sinks=sinks),
        needs_sums=True,
    )
