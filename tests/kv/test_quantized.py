"""Codes must answer as a cache that is rounded token by token: a stock model with such a cache."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pytest_kvguard.kv.grid import Cell
from pytest_kvguard.kv.prefill import Prefill
from pytest_kvguard.kv.quantized import QuantizedLayer, quantized
from pytest_kvguard.kv.rows import Rows
from pytest_kvguard.kv.seam import Seam, cache_argument
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import EMPTY, Policy, Storage
from pytest_kvguard.policies.full import full
from pytest_kvguard.policies.modifiers import MODIFIERS
from tests.kv.test_engine import answers, prompts, without_draft
from tests.kv.test_engine import run as run_engine
from tests.kv.test_oracle import (
    ANSWER,
    EVICTING,
    PROMPT,
    compressed,
    decoding_of,
    feed,
    masked,
    policy_of,
)
from tests.tiny import family

STORAGES = {
    "kivi": MODIFIERS["kivi"](bits=4, group=4, residual=4),
    "kivi in 2 bits": MODIFIERS["kivi"](bits=2, group=4, residual=8),
    "int8": MODIFIERS["int8"](),
    "fp8": MODIFIERS["fp8"](),
}
QUERY_HEADS = 4
WIDTHS = pytest.mark.parametrize("width", [1, 3, 8], ids=["step by step", "in threes", "in one go"])


def rounded(tokens: Tensor, count: int, codec) -> Tensor:
    """The first ``count`` of (n, D) as codes would restore them, the others as they are."""
    restored = codec.decode(codec.encode(tokens[None, :count]))[0]
    return torch.cat([restored, tokens[count:]])


class RoundedCache(DynamicCache):
    """Remembers every key and value as the model made it; shows them as they would be stored.

    Heads that hold less than others are shown with zeros behind, which a mask must hide.
    """

    def __init__(self, held: Prefill, storage: Storage, masks: list[Tensor] | None) -> None:
        super().__init__()
        self.storage, self.seen = storage, []
        for index, layer in enumerate(held.layers):
            pair = list(layer.keys[:, :-1]), list(layer.values[:, :-1])
            if masks is not None:
                kept = masks[index][:, :-1]
                pair = tuple([head[m] for head, m in zip(x, kept, strict=True)] for x in pair)
            self.seen.append(pair)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        new, storage, shown = (key_states[0], value_states[0]), self.storage, []
        self.seen[layer_idx] = tuple(
            [torch.cat([head, one]) for head, one in zip(heads, ones, strict=True)]
            for heads, ones in zip(self.seen[layer_idx], new, strict=True)
        )
        for which, heads in enumerate(self.seen[layer_idx]):
            parts = []
            for head in heads:
                n, residual = len(head), storage.residual
                old = n - 1  # what was encoded before this token came
                coded = (old - old % residual, max(0, old - residual)) if residual else (n, n)
                parts.append(rounded(head, coded[which], (storage.keys, storage.values)[which]))
            shown.append(torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)[None])
        return tuple(shown)

    def get_seq_length(self, layer_idx=0):
        return max(len(head) for head in self.seen[layer_idx or 0][0])

    def get_mask_sizes(self, *args, **kwargs):
        return self.get_seq_length() + 1, 0


def stock_steps(model: PreTrainedModel, cache: RoundedCache, masks=None) -> Tensor:
    """What the stock model says to the tokens fed after compression, one by one."""
    out = []
    for at, token in enumerate([PROMPT[-1], *ANSWER]):
        hidden = {i: m[at] for i, m in masks.items()} if masks else {}
        with torch.inference_mode():
            position = torch.tensor([[len(PROMPT) - 1 + at]])
            given = {
                "input_ids": torch.tensor([[token]]),
                "position_ids": position,
                **cache_argument(model, cache),
            }
            if hidden:
                with masked(model, hidden):
                    out.append(model(**given).logits[0, -1])
            else:
                out.append(model(**given).logits[0, -1])
    return torch.stack(out)


@WIDTHS
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_codes_answer_as_a_cache_that_is_rounded_token_by_token(name, storage, width):
    check(family(name), STORAGES[storage](full()), width)


@WIDTHS
@pytest.mark.parametrize("storage", STORAGES)
def test_what_eviction_leaves_is_stored_in_the_same_way(storage, width):
    check(family("llama"), STORAGES[storage](policy_of("snapkv")), width)


@WIDTHS
@pytest.mark.parametrize("storage", STORAGES)
def test_heads_that_hold_different_numbers_are_stored_in_the_same_way(storage, width):
    adakv = get_policy("adakv(window=5, floor=0.0)")
    check(family("llama"), STORAGES[storage](adakv), width)


def check(model: PreTrainedModel, policy: Policy, width: int) -> None:
    seam = Seam(model)
    with seam.open():
        held, masks, kept = compressed(seam, policy)
        own = feed(seam, Rows([kept], quantized(policy.store)), width)
        plain = feed(seam, Rows([kept]), width)
    hidden = {layer.layer: shown_of(layer.held) for layer in kept.layers}
    expected = stock_steps(model, RoundedCache(held, policy.store, masks), hidden)
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(own, plain, rtol=1e-3, atol=1e-3)  # something was lost


@pytest.mark.parametrize("width", [1, 8], ids=["step by step", "in one go"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("policy", [p for p in EVICTING if "cache" not in p])
def test_evicting_from_codes_while_decoding_equals_hiding_them(policy, storage, width):
    model, rule = family("llama"), STORAGES[storage](policy_of(policy))
    seam = Seam(model)
    with seam.open():
        held, masks, kept = compressed(seam, rule)
        make = quantized(rule.store, decoding_of(rule, kept))
        seen = what_is_seen(seam, Rows([kept], make))
        own = feed(seam, Rows([kept], make), width)
    expected = stock_steps(model, RoundedCache(held, rule.store, masks), seen)
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)


def shown_of(held: Tensor) -> list[Tensor]:
    """For each token fed, (1, Hq, 1, arrivals): which places of a head were filled."""
    filled = [held + fed for fed in range(1, len(ANSWER) + 2)]  # (Hkv,)
    places = [torch.arange(int(count.max())) < count[:, None] for count in filled]
    return [
        shown.repeat_interleave(QUERY_HEADS // len(held), dim=0)[None, :, None] for shown in places
    ]


def what_is_seen(seam: Seam, rows: Rows) -> dict[int, list[Tensor]]:
    """For each layer and token fed, (1, Hq, 1, arrivals): which arrivals are still there."""
    seen = {index: [] for index in rows.layers}
    for token in [PROMPT[-1], *ANSWER]:
        for index, layer in rows.layers.items():
            there = torch.cat([layer.positions != EMPTY, torch.ones(1, 2, 1).bool()], dim=2)
            seen[index].append(there.repeat_interleave(2, dim=1)[:, :, None])
        rows.feed(seam, [[token]], last=1)
    assert all((~found[-1]).any() for found in seen.values()), "nothing was evicted"
    return seen


@WIDTHS
@pytest.mark.parametrize("storage", STORAGES)
def test_sliding_layers_are_left_alone_and_a_pass_may_be_split(storage, width):
    seam, policy = Seam(family("gemma3")), STORAGES[storage](full())
    with seam.open():
        _, _, kept = compressed(seam, policy)
        rows = Rows([kept], quantized(policy.store))
        own = feed(seam, rows, width)
        alone = feed(seam, Rows([kept], quantized(policy.store)), width=1)
    torch.testing.assert_close(own, alone, rtol=1e-3, atol=1e-3)
    assert [isinstance(layer, QuantizedLayer) for layer in rows.layers.values()] == [False, 1, 1]


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_stored_is_tensors_of_that_many_bytes(storage):
    seam, policy = Seam(family("llama")), STORAGES[storage](full())
    with seam.open():
        held, _, kept = compressed(seam, policy)
    rows = Rows([kept], quantized(policy.store))
    stored = [
        tensor.nbytes
        for layer in rows.layers.values()
        for shelf in (layer.keys, layer.values)
        for tensor in (*shelf.parts, shelf.rest)
    ]
    assert rows.bytes == [sum(stored)]
    plain = sum(x[:, :-1].nbytes for layer in held.layers for x in (layer.keys, layer.values))
    assert Rows([kept]).bytes == [kept.bytes] == [plain]
    assert rows.bytes[0] < plain


def test_bytes_are_those_of_the_papers_arithmetic():
    """40 tokens of 2 heads of 12 channels in 3 layers; 4 bits, groups and a residual of 4."""
    policy = STORAGES["kivi"](full())
    seam = Seam(family("llama"))
    with seam.open():
        _, _, kept = compressed(seam, policy)
    keys = 40 * 12 * 4 // 8 + 10 * 12 * 2 * 4  # codes; scale and zero a channel of 4 tokens
    values = 36 * 12 * 4 // 8 + 36 * 3 * 2 * 4 + 4 * 12 * 4  # the last 4 as they are
    assert Rows([kept], quantized(policy.store)).bytes == [3 * 2 * (keys + values)]


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_side_by_side_answer_as_each_does_alone(storage):
    rule = STORAGES[storage](policy_of("knorm"))
    seam = Seam(family("llama"))
    with seam.open():
        kept = [compressed(seam, rule, ratio)[2] for ratio in (0.3, 0.55, 1.0)]
        make = quantized(rule.store)
        fed = [[PROMPT[-1], *ANSWER][:n] for n in (8, 5, 3)]
        rows = Rows(kept, make)
        together = rows.feed(seam, fed, last=3)
        alone = [Rows([k], make).feed(seam, [f], last=3)[0] for k, f in zip(kept, fed, strict=True)]
        more = rows.feed(seam, [[5], [6], [7]], last=1)
        rows.take([2, 0])
        after = rows.feed(seam, [[9], [8]], last=1)[:, 0]
        again = [Rows([k], make).feed(seam, [[*f, t]], last=1)[0] for k, f, t in
                 zip(kept, fed, (5, 6, 7), strict=True)]  # fmt: skip
        last = Rows([kept[0]], make).feed(seam, [[*fed[0], 5, 8]], last=1)[0, 0]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(more, torch.stack(again), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after[1], last, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", ["full", "snapkv(window=4)", "h2o", "shotkv(window=4)"])
def test_answers_from_codes_are_those_of_one_token_at_a_time(spec):
    """A row that leaves its draft starts over, and ends where a row without any draft would."""
    base = full() if spec == "full" else get_policy(spec)
    cell = Cell(STORAGES["kivi in 2 bits"](base), 0.5)
    grid, _ = run_engine(family("llama"), prompts(), [cell])
    drafts, own = answers(grid)
    assert own != drafts, "no draft diverged"
    for index, prompt in enumerate(prompts()):
        assert own[index] == without_draft(cell, prompt)
    split, _ = run_engine(family("llama"), prompts(), [cell], memory=1)
    assert answers(split)[1] == own


def test_a_storage_alone_saves_the_bytes_it_is_judged_by():
    cell = Cell(STORAGES["int8"](full()), 1.0)
    grid, _ = run_engine(family("llama"), prompts(), [cell])
    outcome = grid.cells[0]
    assert outcome.bytes_held * 32 * 12 == outcome.bytes_full * (8 * 12 + 2 * 32)
    assert all(held.min() == 1 for held in outcome.held)
