"""Bytes that rows will take, told before they are made: what memory is split by."""

from collections.abc import Sequence

from pytest_kvguard.engine.grid import Stopping
from pytest_kvguard.engine.groups import worth_sharing
from pytest_kvguard.engine.requests import HeldPrompt, Request, VerifiedRow, kept_bytes

LOGIT_BYTES = 12  # a float32 logit, its log-softmax, and the reference's


def answer_bytes(held: HeldPrompt, stopping: Stopping, vocabulary: int) -> int:
    """Bytes a row takes beside its prefill when the full cache answers."""
    new = len(held.prompt.tail) + stopping.most
    return held.prefill.stack.position_bytes * new + vocabulary * LOGIT_BYTES


def draft_bytes(tokens: int, vocabulary: int) -> int:
    """Bytes of the logits that decided a draft."""
    return tokens * vocabulary * LOGIT_BYTES


def one_layer_bytes(held: HeldPrompt) -> int:
    """Bytes of a prompt's keys and values in one layer, and of what it is fed in all."""
    stack = held.prefill.stack
    return stack.position_bytes * (held.prompt.fed // len(stack.layers) + len(held.prompt.tail))


def reading_bytes(request: Request) -> int:
    """Bytes a row takes at the most while it reads its draft: its cache, and the logits.

    What lies in the stack is gathered for no more than one layer at a time.
    """
    stack, prompt = request.kept.prefill.stack, request.held.prompt
    copied = kept_bytes(request)
    if request.cell.append_only:
        copied //= len(stack.layers)
    fed = len(prompt.tail) + len(request.draft.tokens)
    return copied + stack.position_bytes * fed + request.draft.logits.numel() * LOGIT_BYTES


def writing_bytes(rows: Sequence[VerifiedRow], stopping: Stopping) -> int:
    """Bytes that rows take when they write on; those of one prompt may share its prefill."""
    requests = [row.request for row in rows]
    _, alone = worth_sharing(requests)
    new = stopping.most + max((len(r.held.prompt.tail) for r in requests), default=0)
    total = sum(kept_bytes(requests[index]) for index in alone)
    return total + sum(new * r.kept.prefill.stack.position_bytes for r in requests)
