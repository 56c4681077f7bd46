"""Which cache the rows of each request have, and which rows lie together."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pytest_kvguard.engine.cache.base import Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.draft import DraftCache
from pytest_kvguard.engine.cache.evicting import Decoding, EvictingCache
from pytest_kvguard.engine.cache.group import Group, MakeCache, blamed_on
from pytest_kvguard.engine.cache.paged import ALL, PagedCache
from pytest_kvguard.engine.cache.quantized import QuantizedCache
from pytest_kvguard.engine.cache.shared import SharedPrefixCache
from pytest_kvguard.engine.requests import HeldPrompt, Request
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.policies.budgets import whole_pages


def draft_groups(
    requests: Sequence[Request], width: int, alike: float
) -> list[tuple[Group, list[int]]]:
    """Make the groups of rows that read their drafts, ``width`` tokens at the most.

    Returns each group with the indices of its requests.
    """
    groups = []
    for same in _by_kind(requests):
        if requests[same[0]].cell.append_only:
            for part in by_length(same, lambda index: requests[index].most, alike):
                rows = Rows([requests[index].kept for index in part])
                groups.append((Group.of(rows, DraftCache), part))
        else:
            groups.append((_decoding_group([requests[i] for i in same], width, width), same))
    return groups


def generation_groups(
    requests: Sequence[Request], capacity: int, new: int, alike: float
) -> list[tuple[Group, list[int]]]:
    """Make the groups of rows that write on.

    capacity: slots for new tokens at first; new: tokens a row is fed at the most. Returns each
    group with the indices of its requests.
    """
    groups = []
    for same in _by_kind(requests):
        if not requests[same[0]].cell.append_only:
            some = [requests[index] for index in same]
            groups.append((_decoding_group(some, capacity, new), same))
            continue
        sharing, alone = worth_sharing([requests[index] for index in same])
        if sharing:
            part = [same[index] for index in sharing]
            rows = Rows([requests[index].kept for index in part])
            group = Group.of(rows, SharedPrefixCache, sliding=DenseCache, capacity=capacity)
            groups.append((group, part))
        lone = [same[index] for index in alone]
        for part in by_length(lone, lambda index: requests[index].most, alike):
            rows = Rows([requests[index].kept for index in part])
            groups.append((Group.of(rows, DenseCache, capacity=capacity), part))
    return groups


def lone_group(request: Request, new: int) -> Group:
    """Make the group of a single row with a copy of what it keeps, so that the rest can go.

    new: tokens it is fed at the most.
    """
    if not request.cell.append_only:
        return _decoding_group([request], new, new)
    return Group.of(Rows([request.kept]), DenseCache, capacity=new)


def full_group(held: Sequence[HeldPrompt], capacity: int) -> Group:
    """Make the group of rows that hold everything; only what is new is held apart."""
    rows = Rows([one.full for one in held])
    return Group.of(rows, SharedPrefixCache, sliding=DenseCache, capacity=capacity)


def full_draft_group(held: Sequence[HeldPrompt]) -> Group:
    """Make the group of rows that read their own answers with the full cache."""
    return Group.of(Rows([one.full for one in held]), DraftCache)


def worth_sharing(requests: Sequence[Request]) -> tuple[list[int], list[int]]:
    """Tell which rows have more to copy of a prefill than there is of it; and the others.

    To share it costs a look at all of it for each token, but for all rows together.
    """
    of_slot: defaultdict[int, list[int]] = defaultdict(list)
    alone: list[int] = []
    for index, request in enumerate(requests):
        if request.in_stack:
            of_slot[request.kept.prefill.slot].append(index)
        else:
            alone.append(index)
    sharing: list[int] = []
    for same in of_slot.values():
        copied = sum(requests[index].most for index in same)
        (sharing if copied >= requests[same[0]].kept.length else alone).extend(same)
    return sharing, alone


def by_length(
    items: Iterable[int], length: Callable[[int], float], alike: float
) -> Iterator[list[int]]:
    """Group items whose shortest is an ``alike`` share of the longest, the longest first."""
    group: list[int] = []
    for item in sorted(items, key=lambda item: -length(item)):
        if group and length(item) < alike * length(group[0]):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _by_kind(requests: Sequence[Request]) -> list[list[int]]:
    """Group the indices of requests whose rows decode alike."""
    groups: dict[object, list[int]] = {}
    for index, request in enumerate(requests):
        cell, key = request.cell, "append-only"
        kind: object = key if cell.append_only else (id(cell.policy), cell.decode is None)
        groups.setdefault(kind, []).append(index)
    return list(groups.values())


def _decoding_group(requests: Sequence[Request], capacity: int, new: int) -> Group:
    """Make the group of rows that evict, encode or read in pages; all decode alike."""
    cells = frozenset(request.index for request in requests)
    with blamed_on(cells):
        make = _maker(requests, new)
        rows = Rows([request.kept for request in requests])
        return Group.of(rows, make, sliding=DenseCache, capacity=capacity, cells=cells)


def _maker(requests: Sequence[Request], new: int) -> MakeCache:
    """Choose the cache of rows that evict, encode or read in pages."""
    first = requests[0]
    policy = first.cell.policy
    if policy.read is not None:
        pages = torch.tensor([_pages_read(request) for request in requests])
        return partial(PagedCache, reading=policy.read, pages=pages)
    if first.cell.decode is None:
        assert policy.store is not None
        return partial(QuantizedCache, storage=policy.store)
    decoding = Decoding(
        eviction=first.cell.decode,
        ratio=torch.tensor([r.cell.decode_ratio for r in requests], dtype=torch.float64),
        prompt_length=torch.tensor([len(r.held.prompt.ids) for r in requests]),
        fresh=torch.tensor([r.held.prompt.compressed for r in requests]),
        new=(new,) * len(requests),
        rotation=first.rotation,
        protected=_protections(requests),
    )
    return partial(EvictingCache, decoding=decoding, storage=policy.store)


def _pages_read(request: Request) -> int:
    """Pages a query may read under a policy that reads in pages."""
    how, cell = request.cell.policy.read, request.cell
    if how is None or cell.ratio >= 1:
        return ALL
    return whole_pages(request.held.prompt.compressed, cell.ratio, how.page)


def _protections(requests: Sequence[Request]) -> Tensor | None:
    """Mark by position what no row may evict while decoding, (R, P) bool; None: nothing anywhere.

    The last place is no position of any prompt.
    """
    rows = [(request.held, request.cell.policy) for request in requests]
    if not any(held.prompt.protected or policy.stays for held, policy in rows):
        return None
    return F.pad(pad_sequence([_lasting(*row) for row in rows], batch_first=True), (0, 1))


def _lasting(held: HeldPrompt, policy: Policy) -> Tensor:
    """Mark what stays while decoding, (tokens of the prompt,) bool.

    What the prompt protects, and the policy in some layer; not a token because it is fed again.
    """
    prompt = held.prompt
    mask = torch.zeros(len(prompt.ids), dtype=torch.bool)
    mask[list(prompt.protected)] = True
    if policy.stays is not None:
        for state in held.prefill.states(prompt.about, mask[: prompt.compressed].clone()):
            mask[: prompt.compressed] |= policy.stays(state).cpu()
    return mask
