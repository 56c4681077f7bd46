"""KeyDiff: keep the keys that differ most from the others.

Park et al., 2025, https://arxiv.org/abs/2504.15364

importance  minus the cosine between the key and the mean of all keys of the head, each of these
            scaled to length 1
budget      given; the same for every layer
selection   the top positions of each key/value head

Differs from the paper: the prompt is read whole and compressed once, where the paper evicts block
after block while reading it, and goes on while decoding.
"""

import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.selectors import top_tokens


def keydiff() -> Policy:
    """Keep the keys that point away from the mean direction of their head's keys."""
    return Policy("keydiff", _importance, keep_ratio, top_tokens)


def _importance(state: LayerState) -> Tensor:
    keys = state.keys.float()
    anchor = F.normalize(keys, dim=-1).mean(dim=1, keepdim=True)  # (Hkv, 1, D)
    return -F.cosine_similarity(keys, anchor, dim=-1)
