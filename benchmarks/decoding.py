"""Decoding from what cells keep, timed: shared by the benchmarks that do."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from meters import forget_peak, joules, peak, wait

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.cache.base import LayerCache
from pytest_kvguard.engine.cache.evicting import EvictingCache
from pytest_kvguard.engine.cache.shared import SharedPrefixCache
from pytest_kvguard.engine.compress import Compressor
from pytest_kvguard.engine.generate import Part, generate
from pytest_kvguard.engine.grid import About, Answer, Cell, Prompt, Stopping
from pytest_kvguard.engine.groups import full_group, generation_groups
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.own_prefill import OwnPrefills
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.engine.requests import Draft, HeldPrompt, Request
from pytest_kvguard.engine.settings import Settings
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.full import full

FULL = "full"
UNIT = 50  # tokens


@dataclass(frozen=True)
class Decoded:
    """What decoding the answers of some rows took."""

    rows: int
    tokens: int  # that were written, over all rows
    seconds: float
    step: float  # seconds of one step, in the second half, where all that is captured is
    joules: float | None
    first: int  # bytes of keys and values that are held before the first token, over all rows
    last: int  # and after the last
    read: int  # bytes of keys and values that a step reads, each tensor once
    peak: int | None  # bytes of all tensors together; None: not measured


def cell_of(name: str, ratio: float) -> Cell:
    """Make the cell of a policy, or of the full cache."""
    return Cell(full(), 1.0) if name == FULL else Cell(get_policy(name), ratio)


def random_prompts(count: int, length: int, vocabulary: int) -> list[Prompt]:
    """Draw tokens, in units of fifty for policies that keep units."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(4, vocabulary, (count, length), generator=generator)
    units = tuple((range(at, at + UNIT),) for at in range(0, length - UNIT - 10, UNIT))
    about = About(units=units)
    return [Prompt(tuple(ids), context=0, about=about) for ids in drawn.tolist()]


def endless(new: int) -> Stopping:
    """Let no answer end before it has this many tokens."""
    return Stopping(new, frozenset(), (), lambda ids: "")


@torch.inference_mode()
def decode(
    hook: AttentionHook,
    prompts: Sequence[Prompt],
    cells: Sequence[Cell],
    new: int,
    settings: Settings | None = None,
) -> Decoded:
    """Read prompts, compress each under every cell, and time the decoding of their answers."""
    device, settings = hook.device, settings or Settings.on(hook.device)
    watch = StopWatch(device, after=1 + new // 2)  # the first token is fed in a pass of its own
    with hook.open(watch.passed):
        forget_peak(device)
        requests = compressed(hook, prompts, cells, settings)
        batch, requests = batch_of(hook, requests, new, settings)
        kept = [request.kept.bytes for request in requests]
        tails = [request.held.prompt.tail for request in requests]
        stack = requests[0].kept.prefill.stack
        fed = [(len(tail) + new - 1) * stack.position_bytes for tail in tails]
        slot = stack.compressible[0].token_bytes
        del requests, stack  # and with them the prefills, where no row looks at them
        first = sum(held(batch, kept, slot))
        answers = [Answer() for _ in tails]
        meter = joules(device)
        watch.start()
        generate([Part(batch, tails, answers)], endless(new), settings)
        seconds, late = watch.stop()
        now = joules(device)
    return Decoded(
        rows=len(batch),
        tokens=len(batch) * new,
        seconds=seconds,
        step=late / (new - 1 - new // 2) if new > 2 else seconds / new,
        joules=None if meter is None or now is None else now - meter,
        first=first,
        last=sum(held(batch, map(sum, zip(kept, fed, strict=True)), slot)),
        read=sum(read_bytes(cache) for group in batch.groups for cache in group.caches.values()),
        peak=peak(device),
    )


class StopWatch:
    """Times what happens on a device, and what is left of it ``after`` so many passes."""

    def __init__(self, device: torch.device, after: int) -> None:
        self.device, self.after = device, after
        self.start()

    def start(self) -> None:
        """Begin anew."""
        wait(self.device)
        self.passes, self.began = 0, time.perf_counter()
        self.later = self.began

    def passed(self) -> None:
        """Note a pass of the model."""
        self.passes += 1
        if self.passes == self.after:
            wait(self.device)
            self.later = time.perf_counter()

    def stop(self) -> tuple[float, float]:
        """Return the seconds since the start, and those after so many passes."""
        wait(self.device)
        now = time.perf_counter()
        return now - self.began, now - self.later


def compressed(
    hook: AttentionHook, prompts: Sequence[Prompt], cells: Sequence[Cell], settings: Settings
) -> list[Request]:
    """Prefill prompts into one stack and choose what every cell keeps of each."""
    observe = Observe(
        max(cell.policy.window for cell in cells), any(cell.policy.needs_sums for cell in cells)
    )
    wanted = [Wanted(prompt.ids, slot=slot) for slot, prompt in enumerate(prompts)]
    made = prefill(hook, wanted, observe, most_tokens=settings.prefill_tokens)
    own, draft = OwnPrefills(hook), Draft([], torch.empty(0, hook.vocabulary))
    return [
        compressor.request(draft, index, cell)
        for at, pair in enumerate(zip(prompts, made, strict=True))
        for compressor in [Compressor(hook, HeldPrompt(at, *pair), own)]
        for index, cell in enumerate(cells)
    ]


def batch_of(
    hook: AttentionHook, requests: Sequence[Request], new: int, settings: Settings
) -> tuple[Batch, list[Request]]:
    """Make a batch as the engine makes it; return it and what each of its rows is."""
    room = new + max(len(request.held.prompt.tail) for request in requests)
    if all(request.kept.whole and request.cell.append_only for request in requests):
        groups = [(full_group([request.held for request in requests], room), range(len(requests)))]
    else:
        groups = generation_groups(requests, room, room, settings.alike)
    rows = [requests[index] for _, same in groups for index in same]
    start = [row.held.prompt.fed for row in rows]
    return Batch(hook, [group for group, _ in groups], start), rows


def held(batch: Batch, come: Iterable[int], slot: int) -> list[int]:
    """Say what each row of a batch holds, in bytes.

    come: bytes of all that ever came into each; slot: of one position in one head.
    """
    rows = zip(batch.bytes, come, batch.evicted, strict=True)
    return [size - gone * slot if codes is None else codes for codes, size, gone in rows]


def read_bytes(cache: LayerCache) -> int:
    """Bytes of the keys and values that a step reads of a layer, a shared prefix once."""
    if isinstance(cache, EvictingCache):
        holder = cache.codes or cache.slots
        return holder.keys.nbytes + holder.values.nbytes
    own = cache.keys.nbytes + cache.values.nbytes
    if isinstance(cache, SharedPrefixCache):
        own += sum(held.nbytes for held in cache.prefix)
    return own
