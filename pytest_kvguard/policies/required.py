"""Whitelists: positions that stay whatever their importance, charged to the budget.

Whitelist: Chen et al., 2025 (The Pitfalls of KV Cache Compression), https://arxiv.org/abs/2510.00231

Differs from the paper: it lists the tokens of one phrase by hand; here parts of a prompt are
required by their kind, or positions by how far they are from an end.

What is required stays while decoding too.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.parameters import check_choice, check_count, check_share
from pytest_kvguard.policies.base import LayerState, Modifier, Policy
from pytest_kvguard.policies.budgets import share as share_of
from pytest_kvguard.policies.modify import modified

KINDS = ("system", "instruction", "shot", "document", "question", "template")


def whitelist(kinds: str = "", first: int = 0, last: int = 0) -> Modifier:
    """Keep all parts of some ``kinds``, and the ``first`` and ``last`` positions of the prompt.

    kinds: any of system, instruction, shot, document, question and template, separated by spaces;
    a prompt without such a part is treated as without the whitelist. The budget refuses what it
    cannot hold.
    """
    if not isinstance(kinds, str):
        raise InvalidArgument(f"kinds must be words, such as 'system shot'; got {kinds!r}")
    wanted = [check_choice("kinds", kind, KINDS) for kind in kinds.split()]
    check_count("first", first, least=0)
    check_count("last", last, least=0)
    if not (wanted or first or last):
        raise InvalidArgument(
            "an empty whitelist requires nothing; name kinds of parts, as in "
            "whitelist(kinds='system'), or positions, as in whitelist(first=4)"
        )

    def listed(state: LayerState) -> Tensor:
        mask = _ends(state, first, last)
        for passage in state.passages:
            if passage.kind in wanted:
                mask[passage.positions.start : passage.positions.stop] = True
        return mask

    params = {"whitelist_kinds": kinds, "whitelist_first": first, "whitelist_last": last}
    return lambda policy: modified(policy, "whitelist", params, **_requiring(policy, listed))


def boundary(share: float = 0.1) -> Modifier:
    """Keep this ``share`` of the prompt at its beginning, and as much at its end; of no paper."""
    if check_share("share", share) > 0.5:
        raise InvalidArgument(f"share must be in [0, 0.5], for it is kept twice; got {share!r}")

    def listed(state: LayerState) -> Tensor:
        count = share_of(state.length, share)
        return _ends(state, count, count)

    params = {"boundary_share": share}
    return lambda policy: modified(policy, "boundary", params, **_requiring(policy, listed))


def _ends(state: LayerState, first: int, last: int) -> Tensor:
    mask = torch.zeros_like(state.protected)
    mask[:first] = True
    mask[max(0, state.length - last) :] = True
    return mask


def _requiring(policy: Policy, listed: Callable[[LayerState], Tensor]) -> dict[str, object]:
    """Return the fields of the policy that change where what is listed counts as protected."""

    def held(state: LayerState) -> LayerState:
        return replace(state, protected=state.protected | listed(state))

    return {
        "importance": lambda state: policy.importance(held(state)),
        "budget": lambda state, ratio: policy.budget(held(state), ratio),
        "select": lambda importance, n, state: policy.select(importance, n, held(state)),
        "stays": lambda state: listed(state) | policy.fixed(state),
    }
