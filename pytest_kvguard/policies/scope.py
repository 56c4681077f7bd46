"""SCOPE: freeze what is left of the prompt, and keep a window of the answer of its own.

Wu et al., 2024, https://arxiv.org/abs/2412.13649

importance  while decoding, attention of the newest query, summed over the group's query heads
budget      of the prompt as given; of the answer a number of tokens, whatever the ratio
selection   of the prompt as SnapKV, frozen from then on; of the answer the last `recent` tokens
            and the top ones before them, `window` in all (slide); or as many as recent ones and
            one more for every `every` generated, up to `window` (adaptive); or that, but freed
            only after every `every` tokens (discontinuous)

Differs from the paper: query heads that share a key/value head add up their attention; window,
recent and the answer that is expected are a sixteenth of its 512, 256 and 4096 tokens, for answers
of tens to hundreds of tokens, which leaves `every` at its 15; adaptive windows stop growing at
`window`; how far an answer has come is read from positions, where the published code counts calls
and carries the count over to the next prompt. Behind another policy, as in ``shotkv+scope``, only
the decode phase is used.
"""

from dataclasses import replace

import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.parameters import check_choice, check_count, frozen
from pytest_kvguard.policies.base import DecodeEviction, DecodeState, Policy
from pytest_kvguard.policies.snapkv import snapkv

STRATEGIES = ("slide", "adaptive", "discontinuous")


def scope(strategy: str = "slide", window: int = 32, recent: int = 16, every: int = 15) -> Policy:
    """Prefill as SnapKV; hold up to ``window`` generated tokens, the last ``recent`` among them.

    ``every``: after how many generated tokens an adaptive window grows by one, and a
    discontinuous one frees what is over.
    """
    check_choice("strategy", strategy, STRATEGIES)
    check_count("recent", recent)
    check_count("every", every)
    if check_count("window", window) < recent:
        raise InvalidArgument(
            f"window must hold the recent tokens too, so at least {recent}; got {window}"
        )

    def allowed(state: DecodeState) -> Tensor:
        generated = state.newest + 1 - state.prompt_length  # kept or not, (R,)
        if strategy == "slide":
            return torch.full_like(generated, window - recent)
        before = (generated // every).clamp(min=0, max=window - recent)
        if strategy == "adaptive":
            return before
        return torch.where(generated % every == 0, before, state.positions.shape[-1])

    return replace(
        snapkv(),
        name="scope",
        params=frozen(strategy=strategy, window=window, recent=recent, every=every),
        decode=DecodeEviction(
            importance=_current_attention,
            candidates=lambda state: (
                state.generated & (state.positions <= (state.newest - recent)[:, None, None])
            ),
            allowed=allowed,
            slots=lambda budget, new, ratio: budget + new,  # a question fed later stays as well
            burst=every if strategy == "discontinuous" else 1,
            by_ratio=False,
        ),
    )


def _current_attention(state: DecodeState) -> Tensor:
    return state.weights.unflatten(1, (state.positions.shape[1], -1)).sum(dim=2)  # (R, Hkv, C)
