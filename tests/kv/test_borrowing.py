"""Rows that borrow what they keep: what is copied, when, and who may share a prefill."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pytest_kvguard.kv import borrowing as module
from pytest_kvguard.kv.borrowing import BorrowingLayer, borrowing
from pytest_kvguard.kv.compress import Kept, KeptLayer, keep, keep_all
from pytest_kvguard.kv.parted import ALIKE, PartedLayer, alike
from pytest_kvguard.kv.prefill import Observe, Prefill, prefill
from pytest_kvguard.kv.rows import GrowingLayer, Rows, growing
from pytest_kvguard.kv.seam import Seam
from pytest_kvguard.kv.sharing import SharingLayer, worth_sharing
from tests.tiny import family, llama, tokens

LENGTH = 60


def kept_shares(held: Prefill, *shares: float) -> list[Kept]:
    """The first share of the positions, for each share."""
    out = []
    for share in shares:
        mask = torch.zeros(held.layers[0].keys.shape[:2], dtype=torch.bool)
        mask[:, : int(share * LENGTH)] = True
        layers = len(held.layers)
        out.append(keep(held, [mask] * layers, [LENGTH] * layers, LENGTH))
    return out


def read(seam: Seam, text: list[int]) -> Prefill:
    with seam.open():
        return prefill(seam, text, Observe())


def test_a_pass_over_drafts_holds_copies_of_one_layer_at_a_time(monkeypatch):
    """What was gathered for a layer is gone when the next one attends."""
    model = llama(num_hidden_layers=6)
    seam = Seam(model)
    held = read(seam, tokens(LENGTH))
    size, seen = held.layers[0].keys.shape[-1], []
    original = module.attend

    def attend(query: Tensor, keys: Tensor, *rest: object) -> Tensor:
        found = (t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.ndim > 2)
        storages = (t.untyped_storage() for t in found if t.shape[-1] == size)
        seen.append((sum({s.data_ptr(): s.nbytes() for s in storages}.values()), keys.nbytes))
        return original(query, keys, *rest)

    monkeypatch.setattr(module, "attend", attend)
    with seam.open():
        rows = Rows(kept_shares(held, *[0.9] * 8), borrowing)
        rows.feed(seam, [[7, 8, 9]] * 8, last=1)
    new = 8 * 3 * sum(layer.keys.nbytes // LENGTH for layer in held.layers)  # of all layers
    first, last = seen[0][0], seen[-1][0]
    assert len(seen) == 6
    assert last - first <= 2 * new < seen[0][1]


def test_what_is_kept_is_copied_only_where_that_is_less_than_what_there_is():
    seam = Seam(family("llama"))
    one, other = (read(seam, tokens(LENGTH, seed=seed)) for seed in (1, 2))
    kept = [*kept_shares(one, 0.5, 0.3), *kept_shares(other, 0.5, 0.6), *kept_shares(one, 0.1)]
    assert worth_sharing([row.layers[0] for row in kept]) == ([[2, 3]], [0, 1, 4])
    kept.append(kept_shares(one, 0.2)[0])
    sharing, alone = worth_sharing([row.layers[0] for row in kept])
    assert (sharing, alone) == ([[0, 1, 4, 5], [2, 3]], [])


@pytest.mark.parametrize("change", ["half precision", "a window"])
def test_rows_do_not_share_what_a_plain_product_would_get_wrong(change):
    held = read(Seam(family("llama")), tokens(LENGTH))
    kept = keep_all(held, LENGTH).layers[0]
    assert isinstance(kept, KeptLayer)
    assert worth_sharing([kept, kept]) == ([[0, 1]], [])
    if change == "a window":
        changed = KeptLayer(0, kept.source, None, kept.positions, window=8, budget=LENGTH)
    else:
        source = type(kept.source)(kept.source.keys.bfloat16(), kept.source.values.bfloat16())
        changed = KeptLayer(0, source, None, kept.positions, window=None, budget=LENGTH)
    assert worth_sharing([changed, changed]) == ([], [0, 1])


@pytest.mark.parametrize("make", [growing, borrowing])
def test_rows_of_prompts_that_look_alike_are_not_mixed_up(make):
    """Same length, same places, other text: only where they lie tells their caches apart."""
    seam = Seam(family("llama"))
    one, other = (read(seam, tokens(LENGTH, seed=seed)) for seed in (1, 2))
    kept = [*kept_shares(one, 0.5), *kept_shares(other, 0.5, 0.5), *kept_shares(one, 0.5)]
    with seam.open():
        together = Rows(kept, make).feed(seam, [[7, 8]] * 4, last=1)
        alone = [Rows([row], make).feed(seam, [[7, 8]], last=1) for row in kept]
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_rows_that_go_on_are_in_the_layers_that_suit_them_and_claim_what_they_hold():
    seam = Seam(family("llama"))
    one, other = (read(seam, tokens(LENGTH, seed=seed)) for seed in (1, 2))
    kept = [*kept_shares(one, 0.8, 0.4), *kept_shares(other, 0.5)]
    with seam.open():
        rows = Rows(kept, borrowing)
        rows.feed(seam, [[7, 8], [9], [10, 11]], last=1)
        before = rows.bytes
        rows.own(4)
    for layer in rows.layers.values():
        assert isinstance(layer, PartedLayer)
        kinds = [(sorted(mine.tolist()), type(part)) for mine, part in layer.parts]
        assert kinds == [([0, 1], SharingLayer), ([2], GrowingLayer)]
    token = one.layers[0].keys.nbytes // LENGTH * 2 * len(one.layers)
    assert before == rows.bytes == [token * n for n in (50, 25, 32)]
    rows.take([2, 0])
    assert rows.bytes == [token * n for n in (32, 50)]
    assert rows.evicted == [0, 0]


def test_joined_parts_keep_their_rows_apart():
    """What Rows does while it borrows can be done afterwards as well."""
    seam = Seam(family("llama"))
    held = read(seam, tokens(LENGTH))
    kept = kept_shares(held, 0.2, 0.3, 0.9, 0.8)
    fed = [[7], [8, 9], [10, 11, 12], [13]]  # padded beside each other
    with seam.open():
        whole = Rows(kept)
        whole.feed(seam, fed, last=1)
        expected = whole.feed(seam, fed, last=1)
        first, second = Rows(kept[:2], borrowing), Rows(kept[2:], borrowing)
        first.feed(seam, fed[:2], last=1)
        second.feed(seam, fed[2:], last=1)
        first.own(1)
        second.own(1)
        first.join([second])
        found = first.feed(seam, fed, last=1)
        first.take([1, 3])
        whole.take([1, 3])
        later = [rows.feed(seam, [[5], [6]], last=1) for rows in (first, whole)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*later, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_every_row_is_in_one_group_and_none_is_padded_much(lengths):
    groups = list(alike(lengths))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert min(lengths[index] for index in group) >= ALIKE * longest


def test_a_borrowing_layer_forgets_what_it_is_told_to():
    held = read(Seam(family("llama")), tokens(LENGTH))
    layer = BorrowingLayer([row.layers[0] for row in kept_shares(held, 0.5, 0.5)])
    layer.positions = torch.tensor([[60, 61, 62], [60, 61, -1]])
    layer.keys = layer.keys.new_zeros(2, layer.keys.shape[1], 3, layer.keys.shape[-1])
    layer.values = layer.keys
    before = layer.bytes
    layer.forget(torch.tensor([61, 62]))
    assert layer.positions.tolist() == [[60, -1, -1], [60, 61, -1]]
    token = 2 * layer.keys.shape[1] * layer.keys.shape[-1] * 4
    assert (before - layer.bytes).tolist() == [2 * token, 0]
