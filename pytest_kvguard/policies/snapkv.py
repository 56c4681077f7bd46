"""SnapKV: keep what the end of the prompt attends to.

Li et al., 2024, https://arxiv.org/abs/2404.14469

importance  attention paid by the last `window` queries, smoothed over `kernel` neighbours so
            that runs of positions survive together
budget      given; the same for every layer
selection   the top positions of each key/value head; the window stays before any other

Differs from the paper: query heads that share a key/value head add up their votes, so that a
budget counts stored keys; the budget is a fraction of the prompt, not a number of positions, so
short prompts are compressed too; with less room than the window the latest of it stay.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.parameters import check_choice, check_count, check_odd, frozen
from pytest_kvguard.policies.base import Importance, LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.observe import window_attention
from pytest_kvguard.policies.recency import favour_latest
from pytest_kvguard.policies.selectors import top_tokens

POOLINGS: dict[str, Callable[..., Tensor]] = {"avg": F.avg_pool1d, "max": F.max_pool1d}


def snapkv(window: int = 32, kernel: int = 5, pooling: str = "avg") -> Policy:
    """Keep what the last ``window`` queries attend to, smoothed by an ``"avg"`` or ``"max"``."""
    return Policy(
        "snapkv",
        smoothed_votes(window, kernel, pooling),
        keep_ratio,
        top_tokens,
        params=frozen(window=window, kernel=kernel, pooling=pooling),
        window=window,
    )


def smoothed_votes(window: int, kernel: int, pooling: str) -> Importance:
    """Return SnapKV's importance: the votes, and above them the window."""
    votes = window_votes(window, kernel, pooling)
    return lambda state: favour_latest(votes(state), window)


def window_votes(window: int, kernel: int, pooling: str) -> Importance:
    """Return the smoothed attention paid by the last ``window`` queries, added up.

    The window itself gets no more than what spills over from its neighbours.
    """
    check_count("window", window)
    check_odd("kernel", kernel)
    pool = POOLINGS[check_choice("pooling", pooling, tuple(POOLINGS))]

    def importance(state: LayerState) -> Tensor:
        votes = window_attention(state, window).sum(dim=2)  # (Hkv, G, T)
        votes[..., -window:] = 0  # the window must not lift its neighbours
        return pool(votes, kernel, stride=1, padding=kernel // 2).sum(dim=1)  # (Hkv, T)

    return importance
