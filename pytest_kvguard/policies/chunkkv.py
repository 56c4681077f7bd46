"""ChunkKV: keep runs of neighbouring positions that the end of the prompt attends to.

Liu et al., 2025, https://arxiv.org/abs/2502.00299

importance  attention paid by the last `window` queries, summed over all heads
budget      given; the same for every layer
selection   the top runs of `length` positions, the same for every head; the window stays before
            any other; `reuse` neighbouring layers share the first one's selection

Differs from the paper: a run counts as its mean, not its sum, so that the shorter last one is not
at a disadvantage; the run that no longer fits gives its earliest positions, so that exactly the
budget is kept.
"""

from torch import Tensor

from pytest_kvguard.parameters import check_count, frozen
from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.observe import window_attention
from pytest_kvguard.policies.recency import favour_latest
from pytest_kvguard.policies.selectors import top_chunks


def chunkkv(window: int = 32, length: int = 10, reuse: int = 2) -> Policy:
    """Keep runs of ``length`` positions that the last ``window`` queries attend to."""
    check_count("window", window)
    check_count("reuse", reuse)

    def importance(state: LayerState) -> Tensor:
        votes = window_attention(state, window).sum(dim=(0, 1, 2))  # (T,)
        return favour_latest(votes, window).expand(state.keys.shape[0], -1)

    return Policy(
        "chunkkv",
        importance,
        keep_ratio,
        top_chunks(length, alone=window),
        params=frozen(window=window, length=length, reuse=reuse),
        window=window,
        reuse=reuse,
    )
