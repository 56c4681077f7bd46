"""Reading pages must give what hiding the others would: stock transformers with a mask."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.cache.base import Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.group import Group
from pytest_kvguard.engine.cache.paged import PagedCache
from pytest_kvguard.engine.grid import Cell
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.select import Kept
from pytest_kvguard.engine.settings import Settings
from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import Reading
from pytest_kvguard.policies.quest import upper_bound
from tests.engine.grids import answers, prompts, run, without_draft
from tests.engine.stock import (
    ANSWER,
    FED,
    PROMPT,
    compressed,
    feed,
    hidden_by,
    plain_logits,
    policy_of,
    stock_logits,
)
from tests.tiny import family

PAGE, PAGES = 4, 3
TOTAL, FIRST = len(PROMPT) + len(ANSWER), len(PROMPT) - 1
NAMES = pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3", "gemma2", "gpt_oss"])


def group_of(
    *kept: Kept, dense: int = 0, pages: tuple[int, ...] = (PAGES,), capacity: int = 2
) -> Group:
    """Rows with room for two tokens at first: then they grow."""
    reading = Reading(PAGE, dense, upper_bound)
    make = partial(PagedCache, reading=reading, pages=torch.tensor(pages))
    return Group.of(Rows(kept), make, sliding=DenseCache, capacity=capacity)


class Watched:
    """Notes what each query was shown to choose from, and what it chose."""

    def __init__(self, monkeypatch) -> None:
        self.seen: dict[int, list[tuple[Tensor, Tensor, int, Tensor]]] = {}
        choose = PagedCache.choose

        def note(cache: PagedCache, query: Tensor, asking: Tensor) -> Tensor:
            chosen = choose(cache, query, asking)
            found = query[0].double(), cache.keys[0].double(), int(asking[0, -1]), chosen[0]
            self.seen.setdefault(id(cache), []).append(found)
            return chosen

        monkeypatch.setattr(PagedCache, "choose", note)


def brute_force(query: Tensor, keys: Tensor, position: int) -> set[int]:
    """Quest for one query (D,) and the keys (T, D) of its head: the pages it reads."""
    own = position // PAGE
    bounds = []
    for page in range(own):
        held = keys[page * PAGE : (page + 1) * PAGE].tolist()
        bound = 0.0
        for channel, q in enumerate(query.tolist()):
            column = [key[channel] for key in held]
            bound += max(q * min(column), q * max(column))
        bounds.append((-bound, page))
    return {own} | {page for _, page in sorted(bounds)[: PAGES - 1]}


@NAMES
def test_each_query_head_reads_its_own_best_pages(name, monkeypatch):
    watched, hook = Watched(monkeypatch), AttentionHook(family(name))
    with hook.open():
        _, _, kept = compressed(hook, policy_of("quest"))
        group = group_of(kept)
        feed(hook, group, width=1)
    differ, looked = False, 0
    for cache in group.caches.values():
        for step, (query, keys, position, chosen) in enumerate(watched.seen.get(id(cache), [])):
            assert position == FIRST + step
            size = query.shape[0] // keys.shape[0]
            for head in range(query.shape[0]):
                expected = brute_force(query[head, 0], keys[head // size], position)
                assert set(chosen[head, 0].nonzero().flatten().tolist()) == expected
                looked += 1
            differ = differ or bool((chosen != chosen[:1]).any())
    assert looked >= 2 * len(FED) * 4  # layers, tokens, heads
    assert differ, "all heads chose alike, so the test would prove little"


@pytest.mark.parametrize("dense", [0, 2])
@pytest.mark.parametrize("width", [1, 3, 8], ids=["step by step", "in threes", "in one go"])
@NAMES
def test_reading_pages_equals_hiding_the_others(name, width, dense, monkeypatch):
    model, watched = family(name), Watched(monkeypatch)
    hook = AttentionHook(model)
    with hook.open():
        held, _, kept = compressed(hook, policy_of("quest"))
        group = group_of(kept, dense=dense)
        feed(hook, group, width=1)  # what each token chooses when it comes alone
        own_group = group_of(kept, dense=dense)
        own = feed(hook, own_group, width)
    seen: dict[int, list[Tensor]] = {}
    shares = []
    causal = torch.ones(TOTAL, TOTAL, dtype=torch.bool).tril()
    for layer in held.stack.compressible:
        for at, (*_, chosen) in enumerate(watched.seen[id(group.caches[layer.layer])]):
            pages = chosen[:, 0].repeat_interleave(PAGE, dim=-1)[:, :TOTAL]  # (Hq, slots)
            seen.setdefault(layer.layer, []).append(pages)
            read = (pages & causal[FIRST + at]).sum(dim=-1).double().mean()
            shares.append(read / (FIRST + at + 1))
    expected = stock_logits(model, hidden_by(seen, held, model))
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
    full = all(layer.layer < dense for layer in held.stack.compressible)
    assert full or not torch.allclose(own, plain_logits(model), rtol=1e-2, atol=1e-2)
    [measured] = Batch(hook, [own_group], [0]).read
    assert measured == pytest.approx(float(torch.stack(shares).mean()), abs=1e-9)
    assert dense or measured <= PAGES * PAGE / len(PROMPT)


def test_with_pages_enough_everything_is_read():
    hook = AttentionHook(family("llama"))
    with hook.open():
        _, _, kept = compressed(hook, policy_of("quest"))
        group = group_of(kept, pages=(99,))
        own = feed(hook, group, width=3)
        dense = Group.of(Rows([kept]), DenseCache, capacity=2)
        plain = feed(hook, dense, width=3)
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4)
    assert Batch(hook, [group, dense], [0, 0]).read == [1.0, None]


def test_padding_is_not_counted_and_rows_do_not_mix():
    hook = AttentionHook(family("llama"))
    with hook.open():
        _, _, kept = compressed(hook, policy_of("quest"))
        fed = [FED, FED[:1]]
        both = Batch(hook, [group_of(kept, kept, pages=(PAGES, PAGES + 2))], [FIRST] * 2)
        together = both.feed(fed, last=1)[:, 0]
        for row, tokens in enumerate(fed):
            batch = Batch(hook, [group_of(kept, pages=(PAGES + 2 * row,))], [FIRST])
            alone = batch.feed([tokens], last=1)[0, 0]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
            assert batch.read == pytest.approx([both.read[row]])


def test_no_key_of_a_page_exceeds_its_bound():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 8, generator=generator)
    keys = torch.randn(2, 2, 5, PAGE, 8, generator=generator)  # (R, Hkv, P, page, D)
    bound = upper_bound(query, keys.amin(dim=3), keys.amax(dim=3))
    products = torch.einsum("rhqd,rhpkd->rhqpk", query, keys.repeat_interleave(2, dim=1))
    assert (bound >= products.amax(dim=-1) - 1e-5).all()
    one = keys[:, :, :, 0]
    exact = torch.einsum("rhqd,rhpd->rhqp", query, one.repeat_interleave(2, dim=1))
    torch.testing.assert_close(upper_bound(query, one, one), exact)


def test_slots_that_are_no_positions_are_refused():
    hook = AttentionHook(family("llama"))
    with hook.open():
        _, _, kept = compressed(hook, policy_of("snapkv"))
    with pytest.raises(InvalidArgument, match="must be held in full"):
        group_of(kept)


@pytest.mark.parametrize("settings", [None, Settings(capacity=1, growth=3)], ids=["room", "grows"])
@pytest.mark.parametrize("dense", [0, 1])
def test_the_engine_reads_the_share_it_was_asked_for(dense, settings):
    cells = [Cell(get_policy(f"quest(page=4, dense={dense})"), ratio) for ratio in (0.3, 0.5, 1.0)]
    grid, _ = run(family("llama"), prompts(), cells, settings=settings)
    drafts, *own = answers(grid)
    assert own[0] != drafts, "no draft diverged"
    assert own[2] == drafts
    for cell, found in zip(cells[:2], own[:2], strict=True):
        for index, prompt in enumerate(prompts()):
            assert found[index] == without_draft(cell, prompt)
    low, half, all_read = (outcome.read for outcome in grid.cells.values())
    assert all_read == pytest.approx([1.0] * 4)
    assert all(a < b < 1 for a, b in zip(low, half, strict=True))
    assert (max(low) <= 0.3 and max(half) <= 0.5) == (dense == 0)
    assert grid.cells[0].bytes_held == grid.cells[0].bytes_full
    assert all(held.min() == 1 for held in grid.cells[0].held)
    assert grid.baseline.read == []


def test_less_than_a_page_is_refused_by_the_cell_that_asks_for_it():
    cells = [Cell(get_policy("quest"), ratio) for ratio in (0.3, 0.5)]
    grid, _ = run(family("llama"), prompts(), cells)
    assert grid.cells[0].problem == (
        0,
        "Refused: keep ratio 0.3 of 34 positions is 10, less than one page of 16; "
        "use longer prompts, a larger ratio or smaller pages",
    )
    assert grid.cells[1].problem is None


@pytest.mark.parametrize("what", ["store", "decode"])
def test_a_cache_that_changes_is_not_read_in_pages(what):
    other = get_policy("h2o|int8")
    with pytest.raises(InvalidArgument, match="quest: pages are read of a cache in which everyth"):
        replace(get_policy("quest"), **{what: getattr(other, what)})
