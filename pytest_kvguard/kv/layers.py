"""How the layers of a batch decode: what stays, what is evicted, encoded or read in part."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pytest_kvguard.kv.evicting import Decoding, evicting
from pytest_kvguard.kv.grid import Cell
from pytest_kvguard.kv.jobs import HeldPrompt, Job
from pytest_kvguard.kv.quantized import quantized
from pytest_kvguard.kv.reading import ALL, reading
from pytest_kvguard.kv.rope import Rotation
from pytest_kvguard.kv.rows import LayerFactory, growing
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.policies.budgets import whole_pages


def decoding_alike(cells: Sequence[Cell]) -> list[list[int]]:
    """Group the indices of cells whose rows are decoded side by side, the longest rows first.

    Those whose heads hold different numbers are apart: attention goes head by head there.
    """
    groups: dict[object, list[int]] = {}
    for index, cell in enumerate(cells):
        policy = cell.policy
        key: object = "ragged" if policy.shares_heads else "even"
        if not cell.grows:
            key = id(policy), cell.decode is None
        groups.setdefault(key, []).append(index)
    # Rows of like length beside each other leave little to be padded.
    return [sorted(group, key=lambda index: -cells[index].ratio) for group in groups.values()]


def layers_of(
    batch: Sequence[Job], cells: Sequence[Cell], most: int, rotation: Rotation | None
) -> LayerFactory:
    """Choose how the layers of a batch decode; all its rows decode alike.

    most: new tokens of an answer. rotation: turns keys to their index in the cache, if they do.
    """
    cell = cells[batch[0].cell]
    store = cell.policy.store
    prompts = [job.held.prompt for job in batch]
    device = batch[0].held.device
    if cell.policy.read:
        pages = [pages_read(job, cells[job.cell]) for job in batch]
        return reading(cell.policy.read, torch.tensor(pages, device=device))
    if cell.decode is None:
        return quantized(store) if store else growing
    ratios = [cells[job.cell].decode_ratio for job in batch]
    decoding = Decoding(
        eviction=cell.decode,
        ratio=torch.tensor(ratios, dtype=torch.float64, device=device),
        prompt_length=torch.tensor([len(p.ids) for p in prompts], device=device),
        fresh=torch.tensor([p.compressed for p in prompts], device=device),
        new=tuple(len(p.tail) + most for p in prompts),
        rotation=rotation,
        protected=protections(batch, cells),
    )
    return quantized(store, decoding) if store else evicting(decoding)


def protections(batch: Sequence[Job], cells: Sequence[Cell]) -> Tensor | None:
    """Mark by position what no row may evict while decoding, (R, P) bool; None: nothing anywhere.

    The last place is no position of any prompt.
    """
    rows = [(job.held, cells[job.cell].policy) for job in batch]
    if not any(held.prompt.protected or policy.stays for held, policy in rows):
        return None
    return F.pad(pad_sequence([lasting(*row) for row in rows], batch_first=True), (0, 1))


def lasting(held: HeldPrompt, policy: Policy) -> Tensor:
    """Mark what stays while decoding, (tokens of the prompt,) bool.

    What the prompt protects, and the policy in some layer; not a token because it is fed again.
    """
    prompt = held.prompt
    mask = torch.zeros(len(prompt.ids), dtype=torch.bool, device=held.device)
    mask[list(prompt.protected)] = True
    if policy.stays is not None:
        for state in held.prefill.states(prompt.about, mask[: prompt.compressed].clone()):
            mask[: prompt.compressed] |= policy.stays(state)
    return mask


def pages_read(job: Job, cell: Cell) -> int:
    """Pages a query may read under a policy that reads in pages."""
    how = cell.policy.read
    if how is None or cell.ratio >= 1:
        return ALL
    return whole_pages(job.held.prompt.compressed, cell.ratio, how.page)
