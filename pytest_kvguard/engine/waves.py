"""Waves: as many prompts as memory holds, prefilled into one stack."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pytest_kvguard.engine.grid import Prompt
from pytest_kvguard.engine.memory import halving
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.engine.requests import HeldPrompt
from pytest_kvguard.engine.settings import Settings
from pytest_kvguard.engine.stack import Prefill, Stack

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Wave:
    """Prompts whose prefills lie in one stack; those with the same ids in the same slot."""

    indices: tuple[int, ...]  # of the prompts, those that share a context together
    slots: dict[Ids, int]  # by what is compressed
    stack: Stack
    shared: frozenset[Ids]  # contexts that several prompts of the run begin with
    contexts: dict[Ids, Prefill]  # those that are prefilled, in this wave or the one before
    done: dict[Ids, Prefill] = field(default_factory=dict)

    def prefill(
        self, hook: AttentionHook, prompts: Sequence[Prompt], observe: Observe, settings: Settings
    ) -> None:
        """Prefill some of the wave's prompts; what was prefilled before is not again."""
        wanted: dict[Ids, Wanted] = {}
        for prompt in prompts:
            ids, context = prompt.ids[: prompt.compressed], prompt.ids[: prompt.context]
            if ids not in self.done:
                shares = context if context in self.shared else ()
                wanted[ids] = Wanted(ids, len(shares), self.slots[ids])

        def work(some: Sequence[Wanted]) -> None:
            made = prefill(hook, some, observe, self.stack, self.contexts, settings.prefill_tokens)
            self.done.update((one.ids, of) for one, of in zip(some, made, strict=True))

        if wanted:
            halving(list(wanted.values()), work)

    def held(self, index: int, prompt: Prompt) -> HeldPrompt:
        """Return a prompt with its prefill."""
        return HeldPrompt(index, prompt, self.done[prompt.ids[: prompt.compressed]])


def waves(prompts: Sequence[Prompt], position_bytes: int, room: int) -> Iterator[Wave]:
    """Split prompts into waves whose stacks fit into ``room`` bytes, one prompt at the least.

    position_bytes: of one position's keys and values in all layers. A wave must be let go of
    before the next one is asked for.
    """
    counts = Counter(prompt.ids[: prompt.context] for prompt in prompts if prompt.context)
    shared = frozenset(ids for ids, count in counts.items() if count > 1)
    contexts: dict[Ids, Prefill] = {}
    for indices in _split(prompts, position_bytes, room):
        compressed = [prompts[index].ids[: prompts[index].compressed] for index in indices]
        slots = {ids: slot for slot, ids in enumerate(dict.fromkeys(compressed))}
        stack = Stack(len(slots), max(len(ids) for ids in slots))
        wave = Wave(tuple(indices), slots, stack, shared, contexts)
        yield wave
        last = prompts[indices[-1]]
        go_on = last.ids[: last.context]  # the next wave may begin with it
        contexts = {ids: one.alone() for ids, one in wave.contexts.items() if ids == go_on}


def _split(prompts: Sequence[Prompt], position_bytes: int, room: int) -> Iterator[list[int]]:
    """Split the indices of prompts, those that share a context together, by first appearance."""
    run: list[int] = []
    lengths: dict[Ids, int] = {}
    for index in by_context(prompts):
        ids = prompts[index].ids[: prompts[index].compressed]
        more = {**lengths, ids: len(ids)}
        if run and len(more) * max(more.values()) * position_bytes > room:
            yield run
            run, more = [], {ids: len(ids)}
        run.append(index)
        lengths = more
    yield run


def by_context(prompts: Sequence[Prompt]) -> list[int]:
    """Order the indices of prompts so that those with the same context follow one another."""
    groups: dict[Ids, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt.ids[: prompt.context] or (-1 - index,), []).append(index)
    return [index for same in groups.values() for index in same]
