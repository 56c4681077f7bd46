"""Reading pages must give what hiding the others would: stock transformers with a mask."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.kv.compress import Kept
from pytest_kvguard.kv.grid import Cell
from pytest_kvguard.kv.reading import ReadingLayer, read_shares, reading
from pytest_kvguard.kv.rows import GrowingLayer, Rows
from pytest_kvguard.kv.seam import Seam
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import Reading
from pytest_kvguard.policies.quest import upper_bound
from tests.kv.test_engine import answers, prompts, without_draft
from tests.kv.test_engine import run as run_engine
from tests.kv.test_oracle import (
    ANSWER,
    PROMPT,
    compressed,
    feed,
    plain_logits,
    policy_of,
    stock_logits,
)
from tests.tiny import WINDOW, family

PAGE, PAGES = 4, 3
TOTAL, FIRST = len(PROMPT) + len(ANSWER), len(PROMPT) - 1


def rows_of(kept: Kept, dense: int = 0, pages: int = PAGES) -> Rows:
    return Rows([kept], reading(Reading(PAGE, dense, upper_bound), torch.tensor([pages])))


class Watched:
    """Notes what each query was shown to choose from, and what it chose."""

    def __init__(self, monkeypatch) -> None:
        self.seen: dict[int, list[tuple[Tensor, Tensor, int, Tensor]]] = {}
        choose = ReadingLayer._choose

        def note(layer: ReadingLayer, query: Tensor, asking: Tensor) -> Tensor:
            chosen = choose(layer, query, asking)
            found = query[0].double(), layer.keys[0].double(), int(asking[0, -1]), chosen[0]
            self.seen.setdefault(id(layer), []).append(found)
            return chosen

        monkeypatch.setattr(ReadingLayer, "_choose", note)


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


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3"])
def test_each_query_head_reads_its_own_best_pages(name, monkeypatch):
    watched, seam = Watched(monkeypatch), Seam(family(name))
    with seam.open():
        _, _, kept = compressed(seam, policy_of("quest"))
        rows = rows_of(kept)
        feed(seam, rows, width=1)
    differ = False
    for layer in rows.layers.values():
        for step, (query, keys, position, chosen) in enumerate(watched.seen.get(id(layer), [])):
            assert position == FIRST + step
            group = query.shape[0] // keys.shape[0]
            for head in range(query.shape[0]):
                expected = brute_force(query[head, 0], keys[head // group], position)
                assert set(chosen[head, 0].nonzero().flatten().tolist()) == expected
            differ = differ or bool((chosen != chosen[:1]).any())
    assert differ, "all heads chose alike, so the test would prove little"


@pytest.mark.parametrize("dense", [0, 2])
@pytest.mark.parametrize("width", [1, 3, 8], ids=["step by step", "in threes", "in one go"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3"])
def test_reading_pages_equals_hiding_the_others(name, width, dense, monkeypatch):
    model, watched = family(name), Watched(monkeypatch)
    seam = Seam(model)
    with seam.open():
        held, _, kept = compressed(seam, policy_of("quest"))
        rows = rows_of(kept, dense)
        feed(seam, rows, width=1)  # what each token chooses when it comes alone
        own_rows = rows_of(kept, dense)
        own = feed(seam, own_rows, width)
    masks = {}
    causal = torch.ones(TOTAL, TOTAL, dtype=torch.bool).tril()
    shares = []
    for layer in held.layers:
        mask = causal.expand(1, model.config.num_attention_heads, -1, -1).clone()
        if layer.window is not None:
            mask &= ~torch.ones(TOTAL, TOTAL, dtype=torch.bool).tril(-WINDOW)
        else:
            steps = watched.seen[id(rows.layers[layer.layer])]
            for at, (_, _, _, chosen) in enumerate(steps):
                pages = chosen[:, 0].repeat_interleave(PAGE, dim=-1)  # (Hq, slots)
                mask[0, :, FIRST + at] &= pages[:, :TOTAL]
                shares.append(mask[0, :, FIRST + at].sum(dim=-1).double().mean() / (FIRST + at + 1))
        masks[layer.layer] = mask
    torch.testing.assert_close(own, stock_logits(model, masks), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(own, plain_logits(model), rtol=1e-2, atol=1e-2)
    [measured] = read_shares(list(own_rows.layers.values()))
    assert measured == pytest.approx(float(torch.stack(shares).mean()), abs=1e-9)
    assert dense or measured <= PAGES * PAGE / len(PROMPT)


def test_with_pages_enough_everything_is_read():
    seam = Seam(family("llama"))
    with seam.open():
        _, _, kept = compressed(seam, policy_of("quest"))
        rows = rows_of(kept, pages=99)
        own = feed(seam, rows, width=3)
        plain = feed(seam, Rows([kept]), width=3)
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4)
    assert read_shares(list(rows.layers.values())) == [1.0]
    assert read_shares([GrowingLayer(list(kept.layers[:1]))]) is None


def test_padding_is_not_counted_and_rows_do_not_mix():
    seam = Seam(family("llama"))
    make = reading(Reading(PAGE, 0, upper_bound), torch.tensor([PAGES, PAGES + 2]))
    with seam.open():
        _, _, kept = compressed(seam, policy_of("quest"))
        fed = [[PROMPT[-1], *ANSWER], [PROMPT[-1]]]
        both = Rows([kept, kept], make)
        together = both.feed(seam, fed, last=1)[:, 0]
        shares = read_shares(list(both.layers.values()))
        for row, tokens in enumerate(fed):
            rows = rows_of(kept, pages=PAGES + 2 * row)
            alone = rows.feed(seam, [tokens], last=1)[0, 0]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
            assert read_shares(list(rows.layers.values())) == pytest.approx([shares[row]])


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
    seam = Seam(family("llama"))
    with seam.open():
        _, _, kept = compressed(seam, policy_of("snapkv"))
    with pytest.raises(InvalidArgument, match="must be held in full"):
        rows_of(kept)


@pytest.mark.parametrize("dense", [0, 1])
def test_the_engine_reads_the_share_it_was_asked_for(dense):
    cells = [Cell(get_policy(f"quest(page=4, dense={dense})"), ratio) for ratio in (0.3, 0.5, 1.0)]
    grid, _ = run_engine(family("llama"), prompts(), cells)
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
    grid, _ = run_engine(family("llama"), prompts(), cells)
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
