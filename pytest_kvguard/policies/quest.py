"""Quest: hold everything, read the pages that may matter to the query.

Tang et al., 2024, https://arxiv.org/abs/2406.10774

pages       `page` neighbouring positions each, with the channel-wise min and max of their keys
importance  of a page to a query: the sum over channels of max(q * min, q * max), which no q.k of
            the page exceeds
selection   at every step and for each query head the page being filled and the top others, as
            many pages as the keep ratio's share of the prompt's tokens has room for

Nothing is evicted: the keep ratio is a share of what is read, not of memory.
Differs from the paper: `dense` layers at the start read everything, 0 by default so that the ratio
holds (the paper: 2); the page being filled is always read, as by the published kernels, not by
the published evaluation; the number of pages follows from the ratio, without a least of 3.
"""

from torch import Tensor

from pytest_kvguard.parameters import check_count, frozen
from pytest_kvguard.policies.base import Policy, Reading
from pytest_kvguard.policies.budgets import everything_in_pages
from pytest_kvguard.policies.full import full


def quest(page: int = 16, dense: int = 0) -> Policy:
    """Read the pages of ``page`` positions that may matter; the first ``dense`` layers read all."""
    check_count("page", page)
    check_count("dense", dense, least=0)
    everything = full()
    return Policy(
        "quest",
        everything.importance,
        everything_in_pages(page),
        everything.select,
        params=frozen(page=page, dense=dense),
        read=Reading(page, dense, upper_bound),
        saves="reads",
    )


def upper_bound(queries: Tensor, lows: Tensor, highs: Tensor) -> Tensor:
    """Bound the products of queries with the keys of pages.

    queries: (R, Hq, Q, D); lows, highs: (R, Hkv, P, D) -> (R, Hq, Q, P) float32
    """
    heads = lows.shape[1]
    by_head = queries.float().unflatten(1, (heads, queries.shape[1] // heads))  # (R, Hkv, G, Q, D)
    low, high = (bound.float().unsqueeze(2).transpose(-1, -2) for bound in (lows, highs))
    # q * max is the larger of the two where q is positive, q * min elsewhere.
    bounds = by_head.clamp(min=0) @ high + by_head.clamp(max=0) @ low
    return bounds.flatten(1, 2)
