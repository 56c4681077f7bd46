"""Split work so that what exists at a time fits in memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


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
