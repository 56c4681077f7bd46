"""Key norm: keep the keys with the smallest L2 norm.

Devoto et al., 2024, https://arxiv.org/abs/2406.11430

importance  minus the L2 norm of the key
budget      given; the same for every layer
selection   the top positions of each key/value head

Differs from the paper: every layer is compressed, none skipped, and at any length; the budget is
rounded down, not up; kept keys stay in the order of the prompt.
"""

from torch import Tensor

from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.selectors import top_tokens


def knorm() -> Policy:
    """Keep the keys with the smallest L2 norm."""
    return Policy("knorm", _importance, keep_ratio, top_tokens)


def _importance(state: LayerState) -> Tensor:
    return -state.keys.float().norm(dim=-1)  # (Hkv, T)
