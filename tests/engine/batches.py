"""Batches that are about to write on, made as the engine makes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.compress import Compressor
from pytest_kvguard.engine.grid import About, Cell, Prompt
from pytest_kvguard.engine.groups import full_group, generation_groups
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.own_prefill import OwnPrefills
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.engine.requests import Draft, HeldPrompt, Request
from pytest_kvguard.engine.settings import Settings
from pytest_kvguard.policies import get_policy
from tests.tiny import tokens

UNITS = tuple((range(start, start + 6),) for start in range(2, 90, 6))
ABOUT = About(units=UNITS, special=(0,), punctuation=(7, 8, 31))
PROMPTS = [Prompt(tuple(tokens(96, seed)), context=0, about=ABOUT) for seed in range(2)]
FULL = "full"
ALIKE = Settings().alike


def requests_of(
    hook: AttentionHook,
    spec: str,
    ratios: Sequence[float] = (0.5, 0.6),
    prompts: Sequence[Prompt] = PROMPTS,
    first: int = 0,
) -> list[Request]:
    """Compress prompts under one policy at some keep ratios; ``first``: the first cell's index."""
    policy = get_policy(spec)
    observe = Observe(policy.window, policy.needs_sums)
    made = prefill(hook, [Wanted(p.ids, slot=at) for at, p in enumerate(prompts)], observe)
    own, draft = OwnPrefills(hook), Draft([], torch.empty(0, hook.vocabulary))
    cells = [Cell(policy, ratio) for ratio in ratios]
    return [
        compressor.request(draft, index, cell)
        for at, pair in enumerate(zip(prompts, made, strict=True))
        for compressor in [Compressor(hook, HeldPrompt(at, *pair), own)]
        for index, cell in enumerate(cells, start=first)
    ]


def batch_of(hook: AttentionHook, *specs: str, room: int = 128) -> tuple[Batch, Tensor]:
    """Make a batch with room for new tokens; return it and the tokens that are fed next, (R, 1).

    Rows are two prompts under each policy at two keep ratios, or with the full cache alone.
    """
    if specs == (FULL,):
        held = [request.held for request in requests_of(hook, "knorm", (1.0,))]
        batch = Batch(hook, [full_group(held, room)], [one.prompt.fed for one in held])
        tails = [one.prompt.tail for one in held]
    else:
        requests = [
            one for at, spec in enumerate(specs) for one in requests_of(hook, spec, first=2 * at)
        ]
        groups = generation_groups(requests, room, room, ALIKE)
        rows = [requests[index].held for _, same in groups for index in same]
        batch = Batch(hook, [group for group, _ in groups], [one.prompt.fed for one in rows])
        tails = [one.prompt.tail for one in rows]
    return batch, batch.feed(tails, last=1)[:, -1].argmax(dim=-1, keepdim=True)
