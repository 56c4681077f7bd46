"""Generation: rows write on, one token a step, greedily; captured as one graph on a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.grid import Answer, Stopping
from pytest_kvguard.engine.groups import full_draft_group, full_group, generation_groups
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.requests import HeldPrompt, VerifiedRow
from pytest_kvguard.engine.settings import Settings


@dataclass(frozen=True)
class Part:
    """Rows that are about to write on."""

    batch: Batch
    feed: Sequence[Sequence[int]]  # what each row is fed first, at least one token
    answers: Sequence[Answer]  # written to in place


def answer_in_full(
    hook: AttentionHook, held: Sequence[HeldPrompt], stopping: Stopping, settings: Settings
) -> list[Answer]:
    """Let the full cache answer some prompts."""
    answers = [Answer() for _ in held]
    start = [one.prompt.fed for one in held]
    tails = [one.prompt.tail for one in held]
    capacity = min(settings.capacity, stopping.most)
    if max(map(len, tails)) == 1:
        batch = Batch(hook, [full_group(held, capacity)], start)
        generate([Part(batch, tails, answers)], stopping, settings)
        return answers
    batch = Batch(hook, [full_draft_group(held)], start)
    _feed(Part(batch, tails, answers))
    going = [row for row, answer in enumerate(answers) if not stopping.over(answer.tokens)]
    if going:
        group = full_group([held[row] for row in going], max(map(len, tails)) + capacity)
        group.begin(
            [batch.fed(row, len(tails[row]), len(tails[row])) for row in going],
            [start[row] for row in going],
        )
        batch = Batch(hook, [group], [start[row] + len(tails[row]) for row in going])
        some = [answers[row] for row in going]
        part = Part(batch, [answer.tokens[-1:] for answer in some], some)
        generate([part], stopping, settings)
    return answers


def write_on(
    hook: AttentionHook, rows: Sequence[VerifiedRow], stopping: Stopping, settings: Settings
) -> list[Answer]:
    """Let rows that disagreed with their drafts write on; return their whole answers."""
    answers = [replace(row.answer, tokens=list(row.answer.tokens)) for row in rows]
    new = max(len(row.request.held.prompt.tail) for row in rows) + stopping.most
    parts = []
    for anew in (False, True):  # those whose cache is gone are fed all they were fed before
        some = [at for at, row in enumerate(rows) if (row.new is None) == anew]
        if not some:
            continue
        most = max(row.fed if row.new else len(row.feed) for row in (rows[at] for at in some))
        capacity = most + min(settings.capacity, stopping.most)
        requests = [rows[at].request for at in some]
        groups = generation_groups(requests, capacity, new, settings.alike)
        order, start = [], []
        for group, same in groups:
            own = [rows[some[index]] for index in same]
            if not anew:
                group.begin([row.new or {} for row in own], [row.start for row in own])
            order += [some[index] for index in same]
            start += [row.start + row.fed for row in own]
        batch = Batch(hook, [group for group, _ in groups], start)
        parts.append(Part(batch, [rows[at].feed for at in order], [answers[at] for at in order]))
    generate(parts, stopping, settings)
    return answers


def generate(parts: Sequence[Part], stopping: Stopping, settings: Settings) -> None:
    """Let every row write on, one token at a time, until its answer is over.

    Each part is fed its first tokens by itself, for some take many; from then on all go together.
    """
    rows: list[Answer] = []
    for part in parts:
        _feed(part)
        rows += part.answers
    batch = parts[0].batch
    for part in parts[1:]:
        batch.join(part.batch)
    decoder = _Decoder(batch, settings)
    while going := [row for row, answer in enumerate(rows) if not stopping.over(answer.tokens)]:
        left = max(stopping.most - len(rows[row].tokens) for row in going)
        if decoder.worth_taking(len(going), len(rows), left):
            batch.take(going)
            rows, going = [rows[row] for row in going], list(range(len(going)))
            decoder = _Decoder(batch, settings)
        written = decoder.steps([answer.tokens[-1] for answer in rows], left)
        for row in going:
            for token in written[row]:
                if not stopping.over(rows[row].tokens):
                    _write(rows[row], token, 1)


def _feed(part: Part) -> None:
    """Feed each row its first tokens, and write the one that follows."""
    chosen = part.batch.feed(part.feed, last=1)[:, -1].argmax(dim=-1)
    for answer, tokens, token in zip(part.answers, part.feed, chosen.tolist(), strict=True):
        _write(answer, token, len(tokens))


def _write(answer: Answer, token: int, fed: int) -> None:
    answer.tokens.append(token)
    answer.forwards += 1
    answer.fed += fed


class _Decoder:
    """Runs steps of a batch: one by one on a CPU, on a GPU several from one captured graph."""

    def __init__(self, batch: Batch, settings: Settings) -> None:
        self.batch, self.settings = batch, settings
        self.on_gpu = batch.next.device.type == "cuda"
        self.ids = torch.zeros(len(batch), 1, dtype=torch.long, device=batch.next.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._rehearsed = 0  # steps that were launched one by one, as a graph needs first

    def worth_taking(self, going: int, rows: int, left: int) -> bool:
        """Whether to drop the rows that are at their end; a graph must then be captured anew."""
        if self.on_gpu and (left < 4 * self.settings.worth_capturing or going > rows // 2):
            return False
        return going < self.settings.worth_keeping * rows

    def steps(self, last: Sequence[int], left: int) -> list[list[int]]:
        """Write up to ``left`` tokens a row behind its last one; return them by row.

        On a GPU nothing waits for the device before ``look_every`` tokens are written.
        """
        self.ids.copy_(torch.tensor(last).unsqueeze(1))
        written = []
        for _ in range(min(self.settings.look_every, left)):
            if self.batch.make_room(1, min(left, self.settings.growth)):
                self._graph, self._rehearsed = None, 0  # what was captured has other tensors
            self._run(left)
            self.batch.counted()
            written.append(self.ids.clone())
        return torch.cat(written, dim=1).tolist()

    def _run(self, left: int) -> None:
        if self._graph is None and self.on_gpu:
            settings = self.settings
            if self._rehearsed >= settings.rehearsals and left >= settings.worth_capturing:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):  # records the step without running it
                    self._step()
            self._rehearsed += 1
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _step(self) -> None:
        self.ids.copy_(self.batch.step(self.ids).argmax(dim=-1, keepdim=True))
