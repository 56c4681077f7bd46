"""Verification: rows read the full cache's answer as a draft, in one pass (speculative decoding).

Leviathan et al., 2023, https://arxiv.org/abs/2211.17192: where every token is the one the row
would have chosen, the answer is the draft's; others go on from the first that is not.
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile

import torch.nn.functional as F
from torch import Tensor

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.grid import Answer, Stopping
from pytest_kvguard.engine.groups import draft_groups, full_draft_group
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.requests import Draft, HeldPrompt, Request, VerifiedRow
from pytest_kvguard.engine.settings import Settings


def verify(
    hook: AttentionHook, requests: Sequence[Request], stopping: Stopping, settings: Settings
) -> list[VerifiedRow]:
    """Let the rows of some requests read their drafts in one pass."""
    width = max(len(r.held.prompt.tail) + len(r.draft.tokens) - 1 for r in requests)
    groups = draft_groups(requests, width, settings.alike)
    order = [index for _, same in groups for index in same]
    rows = [requests[index] for index in order]
    batch = Batch(hook, [group for group, _ in groups], [row.held.prompt.fed for row in rows])
    stored = batch.bytes
    tails = [row.held.prompt.tail for row in rows]
    logits = read_drafts(batch, tails, [row.draft.tokens for row in rows])
    evicted, read = batch.evicted, batch.read
    found = {}
    for at, (index, row) in enumerate(zip(order, rows, strict=True)):
        answer = judge(logits[at], row.draft, len(tails[at]))
        fed = len(tails[at]) + len(row.draft.tokens) - 1
        agreed = len(tails[at]) + len(answer.tokens) - 1
        new = None
        if row.cell.append_only and not stopping.over(answer.tokens):
            new = batch.fed(at, fed, agreed)
        found[index] = VerifiedRow(row, answer, evicted[at], stored[at], read[at], new)
    return [found[index] for index in range(len(requests))]


def read_in_full(
    hook: AttentionHook, held: Sequence[HeldPrompt], answers: Sequence[list[int]]
) -> list[Draft]:
    """Let the full cache read its own answers in one go, so that rounding is told from loss."""
    batch = Batch(hook, [full_draft_group(held)], [one.prompt.fed for one in held])
    logits = read_drafts(batch, [one.prompt.tail for one in held], answers)
    return [Draft(*found) for found in zip(answers, logits, strict=True)]


def read_drafts(
    batch: Batch, tails: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Feed each row its prompt's tail and its draft in one go.

    Returns for each row the logits that decide its draft's tokens, (len(draft), V).
    """
    width = max(len(draft) for draft in drafts)
    feed = [[*tail, *draft[:-1]] for tail, draft in zip(tails, drafts, strict=True)]
    logits = batch.feed(feed, last=width)  # (R, width, V)
    return [logits[row, width - len(draft) :] for row, draft in enumerate(drafts)]


def judge(own: Tensor, draft: Draft, tail: int) -> Answer:
    """Turn a row's logits over a draft, (len(draft), V), into what it would have written so far.

    An answer that agrees all along is the whole draft; another ends with the first token on which
    the row differs. tail: tokens of the prompt that were fed before the draft.
    """
    writes = own.argmax(dim=-1).tolist()
    same = shared(writes, draft.tokens)
    tokens = list(draft.tokens) if same == len(writes) else [*draft.tokens[:same], writes[same]]
    kl = divergence(draft.log_probabilities, F.log_softmax(own.float(), -1))
    alike = sum(a == b for a, b in zip(writes, draft.choices, strict=True))
    return Answer(tokens, kl, alike / len(writes), forwards=1, fed=tail + len(writes) - 1)


def divergence(full: Tensor, own: Tensor) -> float:
    """Return the mean KL(full || own) over tokens in nats; log-probabilities (n, V)."""
    kl = F.kl_div(own, full, reduction="none", log_target=True).sum(dim=-1).mean()
    return max(0.0, kl.item())


def shared(first: Iterable[int], second: Iterable[int]) -> int:
    """Count the tokens two sequences have in common from the start."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
