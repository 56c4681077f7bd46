"""ShotKV: keep whole shots, and of the answer what the newest query attends to.

Liu et al., 2025 (KVFundaBench), section 5.1, https://arxiv.org/abs/2502.01941

importance  attention paid by the last `window` queries, summed over heads (eq. 3)
budget      given; the same for every layer; while decoding, `decode_ratio` of the tokens
            generated so far (eq. 8)
selection   whole units, best mean first, in each layer (eqs. 4-6), frozen from then on; of the
            generated tokens those the newest query attends to most (eq. 7)

Differs from the paper: it leaves open which queries vote (here the last `window`), what a unit
that does not fit means (`rule`), and what becomes of text outside shots (here it stays and is
charged). The newest token always stays, as one of the generated tokens kept.
"""

from torch import Tensor

from pytest_kvguard.parameters import check_count, frozen
from pytest_kvguard.policies.base import DecodeEviction, DecodeState, LayerState, Policy
from pytest_kvguard.policies.budgets import check_ratio, keep_ratio_of_units, shares
from pytest_kvguard.policies.evict import attention_of_all_heads
from pytest_kvguard.policies.observe import window_attention
from pytest_kvguard.policies.selectors import whole_units


def shotkv(window: int = 32, rule: str = "skip", decode_ratio: float | None = None) -> Policy:
    """Keep whole shots, and of the generated tokens a share that each step chooses anew.

    ``rule``: as in `whole_units`. ``decode_ratio``: None for the keep ratio of the prompt.
    """
    check_count("window", window)

    def importance(state: LayerState) -> Tensor:
        return window_attention(state, window).sum(dim=(1, 2))  # the selector sums over heads

    return Policy(
        "shotkv",
        importance,
        keep_ratio_of_units,
        whole_units(rule),
        params=frozen(window=window, rule=rule, decode_ratio=decode_ratio),
        window=window,
        keeps_units=True,
        decode=DecodeEviction(
            importance=attention_of_all_heads,  # equation 7 sums: the same order
            candidates=lambda state: state.generated,
            allowed=_allowed,
            slots=lambda budget, new, ratio: budget + new,  # a question fed later stays as well
        ),
        decode_ratio=None if decode_ratio is None else check_ratio(decode_ratio),
    )


def _allowed(state: DecodeState) -> Tensor:
    generated = state.newest + 1 - state.prompt_length  # kept or not
    kept = shares(generated, state.ratio).clamp(min=1)
    return kept - 1  # the newest stays without being a candidate
