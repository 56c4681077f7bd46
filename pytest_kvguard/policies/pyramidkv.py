"""PyramidKV: SnapKV with a budget that falls from the first layer to the last.

Cai et al., 2024, https://arxiv.org/abs/2406.02069

importance  SnapKV's: attention paid by the last `window` queries, smoothed
budget      on top of the window, falling in a straight line from the first layer to the last,
            which gets 1 / `beta` of the mean
selection   the top positions of each key/value head; the window stays before any other

Differs from the paper: short prompts get a pyramid too, where the published code keeps them
whole or gives every layer the same; layers are rounded down one by one, so that together they
never exceed the mean; query heads that share a key/value head add up their votes; window and
kernel are SnapKV's by default.
"""

from pytest_kvguard.parameters import frozen
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.policies.budgets import pyramid
from pytest_kvguard.policies.selectors import top_tokens
from pytest_kvguard.policies.snapkv import smoothed_votes


def pyramidkv(window: int = 32, kernel: int = 5, beta: int = 20) -> Policy:
    """Keep what SnapKV keeps, more of it in early layers and less in late ones."""
    return Policy(
        "pyramidkv",
        smoothed_votes(window, kernel, "avg"),
        pyramid(beta, window),
        top_tokens,
        params=frozen(window=window, kernel=kernel, beta=beta),
        window=window,
    )
