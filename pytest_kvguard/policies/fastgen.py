"""FastGen: give each head the cheapest of five sets that holds what it attends to.

Ge et al., 2023, https://arxiv.org/abs/2310.01801

importance  attention received from every query of the prompt; ranks what is frequent
budget      given; the same for every layer; it is the mean of the layer's heads
selection   per key/value head the first of special tokens, these with punctuation, with the most
            frequent too, with a window that follows each query too, and everything, that recovers
            a `threshold` of the attention; `frequent` and `local` are shares of the budget

Differs from the paper: where what the heads choose exceeds the budget, the threshold is lowered to
the highest at which it does not; where special tokens alone exceed it, the earliest stay; the
budget of the whole prompt keeps everything. What is recovered is that of the last `window`
queries, averaged over the query heads that share a key/value head. A prompt without special
tokens has its first for one. Protected positions belong to every set. What a head does not need
is not given to others. While decoding everything new stays.
"""

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.parameters import check_count, check_share, frozen
from pytest_kvguard.policies.base import LayerState, Policy
from pytest_kvguard.policies.budgets import keep_ratio, share
from pytest_kvguard.policies.observe import summed_attention, window_attention
from pytest_kvguard.policies.selectors import top_after


def fastgen(
    threshold: float = 0.9, frequent: float = 0.3, local: float = 0.3, window: int = 32
) -> Policy:
    """Keep for each head the cheapest set that recovers ``threshold`` of its attention.

    ``frequent`` and ``local``: how much of the budget the frequent positions and the latest take.
    """
    check_share("threshold", threshold)
    check_share("frequent", frequent)
    check_share("local", local)
    check_count("window", window)

    def seen(state: LayerState) -> Tensor:
        return window_attention(state, window).double().mean(dim=1)  # (Hkv, W, T)

    def select(importance: Tensor, n: int, state: LayerState) -> Tensor:
        special, punctuation = _kinds(state)
        if n == state.length:
            return torch.ones_like(importance, dtype=torch.bool)
        if int((special | state.protected).sum()) >= n:
            kept = top_after(state.protected, special.float(), n)
            return kept.to(importance.device).expand_as(importance)
        nothing = torch.zeros_like(importance, dtype=torch.bool)
        most = top_after(nothing, importance, share(n, frequent))
        latest = share(n, local)
        sets = [(nothing | special | state.protected)]
        sets.append(sets[-1] | punctuation)
        sets.append(sets[-1] | most)
        sets.append(sets[-1] | _latest(state, latest))
        sets.append(~nothing)
        held = torch.stack(sets)  # (5, Hkv, T)
        choice = _cheapest(_recovered(held, latest, state.once(seen)), held, threshold, n)
        return held[choice, torch.arange(len(choice), device=choice.device)]

    return Policy(
        "fastgen",
        lambda state: summed_attention(state).sum(dim=1),
        keep_ratio,
        select,
        params=frozen(threshold=threshold, frequent=frequent, local=local, window=window),
        window=window,
        needs_sums=True,
        shares_heads=True,
    )


def _kinds(state: LayerState) -> tuple[Tensor, Tensor]:
    """Return which tokens are special, one at least, and which punctuation, (T,) bool each."""
    if state.special is None or state.punctuation is None:
        raise InvalidArgument(
            "fastgen must know which tokens are special and which punctuation; "
            "pass `special` and `punctuation`"
        )
    if state.special.any():
        return state.special, state.punctuation
    first = torch.zeros_like(state.special)
    first[0] = True
    return first, state.punctuation


def _latest(state: LayerState, count: int) -> Tensor:
    positions = torch.arange(state.length, device=state.keys.device)
    return positions >= state.length - count


def _recovered(held: Tensor, latest: int, attention: Tensor) -> Tensor:
    """Return the share of attention each set recovers, everything more than any, (5, Hkv).

    attention: (Hkv, W, T) of the last W queries
    """
    positions = torch.arange(attention.shape[2], device=attention.device)
    asking = positions[-attention.shape[1] :, None]
    near = (positions > asking - latest) & (positions <= asking)  # (W, T)
    alone, with_window = held[:3].unsqueeze(2), (held[2].unsqueeze(1) | near).unsqueeze(0)
    recovered = torch.cat(
        [(attention * sets).sum(dim=-1).mean(dim=-1) for sets in (alone, with_window)]
    )
    return torch.cat([recovered, torch.full_like(recovered[:1], float("inf"))])


def _cheapest(recovered: Tensor, held: Tensor, threshold: float, n: int) -> Tensor:
    """Return the set each head takes at the highest threshold that fits, (Hkv,) int64."""
    lower = recovered[recovered < threshold].sort(descending=True).values
    tried = torch.cat([lower.new_tensor([threshold]), lower])  # nothing changes in between
    missed = recovered < tried[:, None, None]  # (K, 5, Hkv)
    choices = missed.long().cumprod(dim=1).sum(dim=1)  # (K, Hkv), the first that is not missed
    costs = held.sum(dim=-1)  # (5, Hkv)
    totals = costs.gather(0, choices).sum(dim=-1)
    return choices[int((totals <= n * held.shape[1]).long().argmax())]
