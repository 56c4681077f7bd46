"""Rows that go through the model together, whatever each of them holds and however it decodes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pytest_kvguard.engine.attention import AttentionCall
from pytest_kvguard.engine.cache.draft import DraftCache
from pytest_kvguard.engine.cache.group import Group, GroupFailed, New, blamed_on
from pytest_kvguard.engine.model import AttentionHook


class Batch:
    """R rows, group by group, each continuing its own prompt."""

    def __init__(self, hook: AttentionHook, groups: Sequence[Group], start: Sequence[int]) -> None:
        """start: the position of each row's next token, in the order of the groups."""
        self.hook, self.groups = hook, list(groups)
        self.next = torch.tensor(list(start), device=hook.device)  # (R,)

    def __len__(self) -> int:
        return len(self.next)

    def feed(self, tokens: Sequence[Sequence[int]], *, last: int) -> Tensor:
        """Push each row's next tokens through the model, padded in front.

        Returns the logits of the last ``last`` tokens, (R, last, V); a row with fewer tokens than
        that has its own in the last places.
        """
        width = max(len(row) for row in tokens)
        ids = torch.zeros(len(self), width, dtype=torch.long)
        for row, new in zip(ids, tokens, strict=True):
            row[width - len(new) :] = torch.tensor(new)
        counts = torch.tensor([len(row) for row in tokens])
        offset = torch.arange(width) - (width - counts)[:, None]
        real = None if bool((counts == width).all()) else (offset >= 0).to(self.next.device)
        # Padding asks from the row's first new position: it sees something, nothing sees it.
        asking = self.next[:, None] + offset.clamp(min=0).to(self.next.device)
        self.make_room(width)
        logits = self.hook.forward(
            ids.to(self.next.device), asking, self._attending(asking, real), last=last
        )
        self.next += counts.to(self.next.device)
        self._advance(width)
        return logits

    def step(self, ids: Tensor) -> Tensor:
        """Feed one token a row, (R, 1); return logits (R, V). Nothing waits for the device.

        Reads and writes tensors in place, so that it can be captured as a graph; call `counted`
        for each time it was run.
        """
        asking = self.next[:, None]
        logits = self.hook.call(ids, asking, self._attending(asking, None), last=1)
        self.next += 1
        for group in self.groups:
            group.cursor.step()
        return logits[:, -1]

    def counted(self) -> None:
        """Count one step."""
        self.hook.passed(len(self))
        for group in self.groups:
            group.cursor.used += 1

    def make_room(self, width: int, more: int = 0) -> bool:
        """See to it that every group has room for ``width`` tokens; say whether it grew.

        more: how many slots to add where there is no room; the width if less.
        """
        grown = False
        for group in self.groups:
            if group.cursor.used + width > group.cursor.capacity:
                group.grow(max(more, width))
                grown = True
        return grown

    def take(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in ascending order."""
        if len(rows) == len(self):
            return
        groups, start = [], 0
        for group in self.groups:
            own = [row - start for row in rows if start <= row < start + group.rows]
            start += group.rows
            if own:
                if len(own) < group.rows:
                    group.take(own)
                groups.append(group)
        self.groups = groups
        self.next = self.next[torch.tensor(rows, device=self.next.device)]

    def join(self, other: "Batch") -> None:
        """Go on with the rows of another batch behind its own."""
        self.groups += other.groups
        self.next = torch.cat([self.next, other.next])

    def fed(self, row: int, fed: int, agreed: int) -> New:
        """Return the keys and values of the first ``agreed`` of the ``fed`` tokens of a row.

        For rows that made one pass and looked at what they keep where it lies.
        """
        start = 0
        for group in self.groups:
            if row < start + group.rows:
                break
            start += group.rows
        found = {}
        for index, cache in group.caches.items():
            assert isinstance(cache, DraftCache)
            first = cache.keys.shape[2] - fed  # padding is in front
            some = (row - start, slice(None), slice(first, first + agreed))
            found[index] = cache.keys[some].clone(), cache.values[some].clone()
        return found

    @property
    def evicted(self) -> list[int]:
        """How many slots each row emptied while decoding, over all layers and heads."""
        counts: list[int] = []
        for group in self.groups:
            found = [cache.freed for cache in group.caches.values()]
            freed = [one.to(self.next.device) for one in found if one is not None]
            counts += torch.stack(freed).sum(dim=0).tolist() if freed else [0] * group.rows
        return counts

    @property
    def bytes(self) -> list[int | None]:
        """Bytes of the codes each row stores, over all layers; None where there are no codes."""
        sizes: list[int | None] = []
        for group in self.groups:
            with blamed_on(group.cells):
                found = [cache.bytes for cache in group.caches.values()]
            stored = [one.cpu() for one in found if one is not None]
            sizes += torch.stack(stored).sum(dim=0).tolist() if stored else [None] * group.rows
        return sizes

    @property
    def read(self) -> list[float | None]:
        """Share of what it holds that each row has read, over layers; None: all of it."""
        shares: list[float | None] = []
        for group in self.groups:
            found = [cache.read for cache in group.caches.values()]
            read = [one.cpu() for one in found if one is not None]
            shares += torch.stack(read).mean(dim=0).tolist() if read else [None] * group.rows
        return shares

    def _advance(self, width: int) -> None:
        for group in self.groups:
            group.cursor.advance(width)

    def _attending(self, asking: Tensor, real: Tensor | None) -> Callable[[AttentionCall], Tensor]:
        def attend(call: AttentionCall) -> Tensor:
            device = call.query.device
            at, there = asking.to(device), None if real is None else real.to(device)
            if len(self.groups) == 1:
                return self._attend(0, call, at, there)
            parts = self._parts(call, at, there)
            return torch.cat([self._attend(index, *part) for index, part in enumerate(parts)])

        return attend

    def _parts(
        self, call: AttentionCall, at: Tensor, real: Tensor | None
    ) -> Iterator[tuple[AttentionCall, Tensor, Tensor | None]]:
        """Split a call by group."""
        start = 0
        for group in self.groups:
            rows = slice(start, start := start + group.rows)
            part = replace(call, query=call.query[rows], key=call.key[rows], value=call.value[rows])
            yield part, at[rows], None if real is None else real[rows]

    def _attend(self, index: int, call: AttentionCall, at: Tensor, real: Tensor | None) -> Tensor:
        group = self.groups[index]
        if group.cells is None:
            return group.caches[call.layer].attend(call, at, real)
        try:
            return group.caches[call.layer].attend(call, at, real)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # a policy's or a codec's: its rows fail alone
            raise GroupFailed(group.cells) from problem
