"""Prefill: run prompts through the model once and keep all that any policy may look at."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_kvguard.engine.attention import (
    AttentionCall,
    attend,
    attend_causally,
    bias_of,
    column_sums,
    visible,
)
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.stack import Prefill, Stack
from pytest_kvguard.errors import Unsupported


@dataclass(frozen=True)
class Observe:
    """What a prefill records for the policies that follow."""

    window: int = 1  # how many of the last queries
    sums: bool = False  # whether attention is summed per key over all queries


@dataclass(frozen=True)
class Wanted:
    """A prompt to prefill into a slot of a stack."""

    ids: tuple[int, ...]
    context: int = 0  # tokens that other prompts begin with too
    slot: int = 0


def prefill(
    hook: AttentionHook,
    wanted: Sequence[Wanted],
    observe: Observe,
    stack: Stack | None = None,
    contexts: dict[tuple[int, ...], Prefill] | None = None,
    most_tokens: int = 1,
) -> list[Prefill]:
    """Prefill prompts into the slots of a stack, by default one of their own.

    A context that several of them begin with goes through the model once: it is looked up in
    ``contexts``, and put there. Prompts that follow nothing, or the same context, share passes of
    up to ``most_tokens`` tokens, padding included. Raises Unsupported when no layer of the model
    can be compressed.
    """
    if stack is None:
        slots = 1 + max(one.slot for one in wanted)
        stack = Stack(slots, max(len(one.ids) for one in wanted))
    contexts = {} if contexts is None else contexts
    done: dict[Wanted, Prefill] = {}
    for context, same in _by_context(wanted):
        before = None
        if context:
            if context not in contexts:
                [contexts[context]] = _run(hook, stack, [_Row(same[0].slot, context)], observe)
            before = contexts[context]
            for one in same:
                stack.adopt(before, one.slot)
        rows = {one: _Row(one.slot, one.ids, before) for one in same}
        for one, row in rows.items():
            if row.new == 0 and before is not None:  # it is the context
                done[one] = Prefill(one.ids, stack, one.slot, before.queries, before.sums)
        for batch in _passes([one for one in same if rows[one].new], rows, most_tokens):
            made = _run(hook, stack, [rows[one] for one in batch], observe)
            done |= dict(zip(batch, made, strict=True))
    if not stack.compressible:
        what = "only sliding attention" if stack.layers else "no attention that can be observed"
        raise Unsupported(
            f"{type(hook.model).__name__} has {what}, so there is nothing to compress; "
            f"use a model with full-attention layers that supports attn_implementation='sdpa'"
        )
    return [done[one] for one in wanted]


@dataclass(frozen=True)
class _Row:
    """A prompt on its way through the model, behind the context it begins with."""

    slot: int
    ids: tuple[int, ...]
    after: Prefill | None = None

    @property
    def start(self) -> int:
        """The position of its first new token."""
        return len(self.after.ids) if self.after else 0

    @property
    def new(self) -> int:
        """How many of its tokens are new."""
        return len(self.ids) - self.start


def _by_context(wanted: Sequence[Wanted]) -> list[tuple[tuple[int, ...], list[Wanted]]]:
    """Group prompts by the context they share with others; those that share none are together."""
    groups: dict[tuple[int, ...], list[Wanted]] = {}
    for one in wanted:
        groups.setdefault(one.ids[: one.context], []).append(one)
    return list(groups.items())


def _passes(
    some: Sequence[Wanted], rows: dict[Wanted, _Row], most_tokens: int
) -> list[list[Wanted]]:
    """Split prompts into passes of the model, like lengths together."""
    passes: list[list[Wanted]] = []
    for one in sorted(some, key=lambda one: -rows[one].new):  # the first of a pass is the longest
        if passes and rows[passes[-1][0]].new * (len(passes[-1]) + 1) <= most_tokens:
            passes[-1].append(one)
        else:
            passes.append([one])
    return passes


def _run(
    hook: AttentionHook, stack: Stack, rows: Sequence[_Row], observe: Observe
) -> list[Prefill]:
    """Run the new tokens of rows that begin at the same position in one pass, padded behind."""
    start, width = rows[0].start, max(row.new for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, : row.new] = torch.tensor(row.ids[start:])
    positions = torch.arange(start, start + width, device=hook.device).expand(len(rows), -1)
    found = [Prefill(row.ids, stack, row.slot) for row in rows]

    def record(call: AttentionCall) -> Tensor:
        return _record(call, stack, rows, found, observe)

    hook.prefill(ids.to(hook.device), positions, record)
    return found


def _record(
    call: AttentionCall,
    stack: Stack,
    rows: Sequence[_Row],
    found: Sequence[Prefill],
    observe: Observe,
) -> Tensor:
    """Store what one layer holds of the new tokens, and return what they see."""
    layer, start = stack.layer(call), rows[0].start
    for at, row in enumerate(rows):
        end = start + row.new
        layer.keys[row.slot, :, start:end] = call.key[at, :, : row.new]
        layer.values[row.slot, :, start:end] = call.value[at, :, : row.new]
    for at, (row, made) in enumerate(zip(rows, found, strict=True)):
        query = call.query[at, :, : row.new]
        queries = query[:, -observe.window :]
        if row.after is not None and queries.shape[1] < observe.window:
            before = row.after.queries[call.layer]
            queries = torch.cat([before, queries], dim=1)[:, -observe.window :]
        made.queries[call.layer] = queries.clone()
        if observe.sums and call.window is None:
            keys = layer.keys[row.slot, :, : start + row.new]
            sums = column_sums(query, keys, call.scoring)
            if row.after is not None:
                sums[:, :start] += row.after.sums[call.layer]
            made.sums[call.layer] = sums
    if start == 0 and call.window is None:
        return attend_causally(call.query, call.key, call.value, call.scoring)
    keys, values = call.key, call.value
    if start:
        end = start + call.query.shape[2]
        keys, values = (_slots(x, [r.slot for r in rows], end) for x in (layer.keys, layer.values))
    held = torch.arange(keys.shape[2], device=keys.device)
    asking = torch.arange(start, start + call.query.shape[2], device=keys.device)
    bias = bias_of(visible(held, asking, call.window), call.query.dtype)[None, None]
    return attend(call.query, keys, values, bias, call.scoring)


def _slots(held: Tensor, slots: Sequence[int], end: int) -> Tensor:
    """Return the first ``end`` positions of some slots, without copying those of one."""
    if len(slots) == 1:
        return held[slots[0] : slots[0] + 1, :, :end]
    return held[torch.tensor(slots, device=held.device), :, :end]
