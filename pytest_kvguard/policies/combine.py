"""One policy for the prompt, the decode phase of another: ``snapkv+h2o``, ``shotkv+h2o@0.5``.

Where the first keeps single tokens, the second goes on over all that is held, as it does after a
prefill of its own. With a keep ratio of its own, or where the first keeps whole units or shares
its budget out between the heads, the prompt is frozen: what was kept of it stays for good, and
the second decides among generated tokens only, of which it may hold its share.

When a generated token is attended, a head of a frozen prompt holds at most that share of all
tokens generated so far, the new one included, but two where its share is less: the token before
leaves only after the new one has come.
"""

from dataclasses import replace
from types import MappingProxyType

import torch

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies.base import EMPTY, DecodeEviction, DecodeState, Policy
from pytest_kvguard.policies.budgets import check_ratio, shares


def combined(prefill: Policy, decode: Policy, ratio: float | None = None) -> Policy:
    """Keep of the prompt what ``prefill`` keeps, and evict while decoding as ``decode`` does.

    ``ratio``: of the generated tokens, in (0, 1]; None for the keep ratio of the prompt.
    Raises InvalidArgument for a policy without a decode phase, and for a ratio that would mean
    nothing or stands beside another.
    """
    name = f"{prefill.name}+{decode.name}"
    if decode.decode is None:
        raise InvalidArgument(
            f"{name}: {decode.name} keeps every generated token, so there is nothing to combine; "
            f"behind the + goes a policy that evicts while decoding, such as h2o or tova"
        )
    if prefill.decode_ratio is not None:
        raise InvalidArgument(
            f"{name}: decode_ratio={prefill.decode_ratio:g} is for the decode phase that "
            f"{decode.name} replaces; write {name}@{prefill.decode_ratio:g}"
        )
    if ratio is not None and not decode.decode.by_ratio:
        raise InvalidArgument(
            f"{name}@{ratio:g}: {decode.name} holds a number of generated tokens that no ratio "
            f"changes; leave @{ratio:g} out and set that number"
        )
    frozen = ratio is not None or prefill.keeps_units or prefill.shares_heads
    own = decode.decode_ratio if ratio is None else check_ratio(ratio)
    theirs = {f"decode_{k}": value for k, value in decode.params.items() if k != "decode_ratio"}
    return replace(
        prefill,
        name=name,
        params=MappingProxyType({**prefill.params, **theirs, "decode_ratio": own}),
        needs_sums=prefill.needs_sums or decode.decode.accumulate,
        rerotate=prefill.rerotate or decode.rerotate,
        decode=among_generated(decode.decode) if frozen else decode.decode,
        decode_ratio=own,
    )


def among_generated(eviction: DecodeEviction) -> DecodeEviction:
    """Return the same eviction for a prompt that is frozen: it sees generated tokens only."""
    return replace(
        eviction,
        importance=lambda state: eviction.importance(state.once(_generated)),
        candidates=lambda state: eviction.candidates(state.once(_generated)) & state.generated,
        allowed=lambda state: eviction.allowed(state.once(_generated)),
        slots=lambda budget, new, ratio: budget + new,  # a question fed later stays as well
    )


def _generated(state: DecodeState) -> DecodeState:
    """Return the state as if nothing of the prompt were held.

    The budget is the share of the tokens generated when the next one has come.
    """
    ours = state.generated
    group = state.weights.shape[1] // ours.shape[1]
    after_next = state.newest + 2 - state.prompt_length
    return replace(
        state,
        weights=state.weights.masked_fill(~ours.repeat_interleave(group, dim=1), 0.0),
        sums=None if state.sums is None else state.sums.masked_fill(~ours, 0.0),
        positions=torch.where(ours, state.positions, EMPTY),
        budget=shares(after_next, state.ratio).clamp(min=0),
        protected=None if state.protected is None else state.protected & ours,
    )
