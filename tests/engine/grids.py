"""Small grids, and the way one row goes through them without a draft."""

from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.cache.base import Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.evicting import Decoding, EvictingCache
from pytest_kvguard.engine.cache.group import Group, MakeCache
from pytest_kvguard.engine.cache.paged import PagedCache
from pytest_kvguard.engine.cache.quantized import QuantizedCache
from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.generate import Part, generate
from pytest_kvguard.engine.grid import About, Answer, Cell, Grid, Outcome, Prompt, Stopping
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.engine.select import importances, keep, keep_masks
from pytest_kvguard.engine.settings import Settings
from pytest_kvguard.policies import get_policy
from tests.tiny import family, tokens

CONTEXT = tokens(30)
QUESTIONS = [tokens(4 + i, seed=i + 1) for i in range(4)]
UNITS = tuple((range(start, start + 5),) for start in range(2, 27, 5))
STOPPING = Stopping(12, frozenset({5}), (), lambda ids: " ".join(map(str, ids)))

EVERY = (
    "snapkv(window=4)",
    "shotkv(window=4)",
    "h2o",
    "tova",
    "streaming_llm(sinks=2)",
    "shotkv(window=4)+h2o@0.3",
    "snapkv(window=4)+tova",
)
EVERY_CACHE = (
    *EVERY,
    "adakv(window=4, floor=0.0)",
    "adakv(window=4, floor=0.0)+h2o@0.5",
    "knorm|kivi(group=4,residual=4)",
    "h2o|int8",
    "quest(page=4, dense=1)",
)


def prompts(*, ahead: bool = False) -> list[Prompt]:
    return [Prompt(tuple(CONTEXT + q), len(CONTEXT), ahead, About(UNITS)) for q in QUESTIONS]


def cells(*specs: str, ratios: tuple[float, ...] = (0.5,)) -> list[Cell]:
    return [Cell(get_policy(spec), ratio) for spec in specs for ratio in ratios]


def outcomes(grid: Grid) -> list[Outcome]:
    found = [grid.baseline, *grid.cells.values()]
    assert [outcome.problem for outcome in found] == [None] * len(found)
    return found


def answers(grid: Grid) -> list[dict[int, list[int]]]:
    return [{i: a.tokens for i, a in sorted(o.answers.items())} for o in outcomes(grid)]


def run(
    model: PreTrainedModel, what: list[Prompt], grid_cells: list[Cell], **settings
) -> tuple[Grid, AttentionHook]:
    hook = AttentionHook(model)
    return Engine(hook, **settings).run(what, grid_cells, STOPPING), hook


def without_draft(cell: Cell, prompt: Prompt) -> list[int]:
    """Answer with one row that reads no draft, but writes from its first token on."""
    hook, answer, device = AttentionHook(family("llama")), Answer(), torch.device("cpu")
    policy = cell.policy
    with hook.open():
        [held] = prefill(hook, [Wanted(prompt.ids)], Observe(policy.window, policy.needs_sums))
        states = held.states(prompt.about, prompt.protection(policy, device))
        masks = keep_masks(policy, importances(policy, states), states, cell.ratio)
        budgets = [policy.budget(state, cell.ratio) for state in states]
        kept = keep(held, masks, budgets, prompt.fed)
        group = Group.of(Rows([kept]), _cache_of(cell, prompt), sliding=DenseCache, capacity=1)
        part = Part(Batch(hook, [group], [prompt.fed]), [prompt.tail], [answer])
        generate([part], STOPPING, Settings(growth=1))
    return answer.tokens


def _cache_of(cell: Cell, prompt: Prompt) -> MakeCache:
    policy = cell.policy
    if policy.read is not None:
        pages = int(len(prompt.ids) * cell.ratio) // policy.read.page
        return partial(PagedCache, reading=policy.read, pages=torch.tensor([pages]))
    if cell.decode is not None:
        length = torch.tensor([len(prompt.ids)])
        ratio = torch.tensor([cell.decode_ratio], dtype=torch.float64)
        decoding = Decoding(cell.decode, ratio, length, length, new=(99,))
        return partial(EvictingCache, decoding=decoding, storage=policy.store)
    if policy.store is not None:
        return partial(QuantizedCache, storage=policy.store)
    return DenseCache


def compared(outcome: Outcome) -> Outcome:
    """What an outcome says of a cell, but for the passes and the time it took to find out."""
    plain = {i: replace(a, forwards=0, fed=0, kl=None) for i, a in sorted(outcome.answers.items())}
    return replace(outcome, answers=plain, held=[], read=[], forwards=0, tokens=0, seconds=0.0)
