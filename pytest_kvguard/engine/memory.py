"""Memory: how much there is, work split to fit, and what is done when it does not."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")

LARGEST = 2**25 - 2**16
"""Bytes of the largest block that glibc learns from, a little less than 32 MiB."""

ON_CPU = 2**30
"""Bytes of caches and logits on a CPU, if nobody says otherwise."""

OF_FREE = 0.7
"""Share of a GPU's free memory that caches and logits may take; the rest is for activations."""


def room_on(device: torch.device) -> int:
    """Return the bytes that caches and logits may take, by default."""
    if device.type != "cuda":
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * OF_FREE)


def peak_on(device: torch.device) -> int | None:
    """Return the most bytes the process has held on a GPU at a time; None: not measured."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def chunks(
    items: Iterable[Item], size: Callable[[Item], int], most: int
) -> Iterator[Sequence[Item]]:
    """Yield runs of items whose sizes add up to at most ``most``, one item at the least.

    Items are asked for one by one, as late as can be.
    """
    run: list[Item] = []
    used = 0
    for item in items:
        need = size(item)
        if run and used + need > most:
            yield run
            run, used = [], 0
        run.append(item)
        used += need
    if run:
        yield run


def halving(items: Sequence[Item], work: Callable[[Sequence[Item]], None]) -> None:
    """Do some work on items; where memory does not hold it, on each half of them.

    ``work`` must leave nothing behind when it runs out of memory. Raises OutOfMemoryError for a
    single item that does not fit.
    """
    try:
        work(items)
        return
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(items) // 2
    halving(items[:middle], work)
    halving(items[middle:], work)


def keep_freed_memory() -> None:
    """Have malloc keep up to 64 MiB of what is freed, instead of handing it back at once.

    glibc keeps twice the size of the largest block freed so far (mallopt(3), M_MMAP_THRESHOLD),
    which is too little for a layer's intermediate results: every layer then gets them from the
    system anew, page by page, each cleared first. One block that is freed untouched teaches it.
    Elsewhere this does nothing.
    """
    torch.empty(LARGEST, dtype=torch.uint8)
