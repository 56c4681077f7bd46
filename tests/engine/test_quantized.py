"""Codes must answer as a cache that is rounded token by token: a stock model with such a cache."""

from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.cache.base import Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.group import Group
from pytest_kvguard.engine.cache.quantized import QuantizedCache
from pytest_kvguard.engine.grid import Cell
from pytest_kvguard.engine.model import AttentionHook, cache_argument
from pytest_kvguard.engine.select import Kept
from pytest_kvguard.engine.stack import Prefill
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import EMPTY, Policy
from pytest_kvguard.policies.full import full
from pytest_kvguard.policies.modifiers import MODIFIERS
from pytest_kvguard.storage.base import Codec, Plain, Storage
from tests.engine.grids import answers, prompts, run, without_draft
from tests.engine.stock import (
    EVICTING,
    FED,
    PROMPT,
    compressed,
    evicting_group,
    feed,
    masked,
    policy_of,
    steps,
)
from tests.tiny import WIDE, family

STORAGES = {
    "kivi": MODIFIERS["kivi"](bits=4, group=4, residual=4),
    "kivi in 2 bits": MODIFIERS["kivi"](bits=2, group=4, residual=8),
    "int8": MODIFIERS["int8"](),
    "fp8": MODIFIERS["fp8"](),
}
WIDE_HEADS = [
    "fp8_e4m3",
    "q8_0(values=q4_0)",
    "q5_1(values=iq4_nl, rotate=False)",
    "nvfp4",
    "turboquant(keys=3, skip=1)",
    "snapkv(window=5)|turboquant_k8v4(skip=0)",
    "adakv(window=5, floor=0.0)|mxfp4",
]
QUERY_HEADS = 4
WIDTHS = pytest.mark.parametrize("width", [1, 3, 8], ids=["step by step", "in threes", "in one go"])


def rounded(tokens: Tensor, count: int, codec: Codec) -> Tensor:
    """The first ``count`` of (n, D) as codes would restore them, the others as they are."""
    restored = codec.decode(codec.encode(tokens[None, :count]), tokens.dtype)[0]
    return torch.cat([restored, tokens[count:]])


class RoundedCache(DynamicCache):
    """Remembers every key and value as the model made it; shows them as they would be stored.

    Heads that hold less than others are shown with zeros behind, which a mask must hide.
    """

    def __init__(self, held: Prefill, storage: Storage, masks: list[Tensor] | None) -> None:
        super().__init__()
        self.storage, self.seen = storage, []
        for index, layer in enumerate(held.stack.layers.values()):
            pair = tuple(
                list(x[held.slot, :, : len(PROMPT) - 1]) for x in (layer.keys, layer.values)
            )
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
            parts, storage = [], self.storage.of_layer(layer_idx, len(self.seen))
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
    for at, token in enumerate(FED):
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


@WIDTHS
@pytest.mark.parametrize("spec", WIDE_HEADS)
def test_formats_of_engines_answer_as_a_cache_that_is_rounded_token_by_token(spec, width):
    check(family(WIDE), get_policy(spec), width)


def group_of(storage: Storage, *kept: Kept) -> Group:
    make = partial(QuantizedCache, storage=storage)
    return Group.of(Rows(kept), make, sliding=DenseCache, capacity=len(FED))


def check(model: PreTrainedModel, policy: Policy, width: int) -> None:
    hook = AttentionHook(model)
    with hook.open():
        held, masks, kept = compressed(hook, policy)
        own = feed(hook, group_of(policy.store, kept), width)
        plain = feed(hook, Group.of(Rows([kept]), DenseCache, capacity=len(FED)), width)
    hidden = {
        layer.layer: shown_of(held) for layer, held in zip(kept.layers, kept.held, strict=True)
    }
    expected = stock_steps(model, RoundedCache(held, policy.store, masks), hidden)
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(own, plain, rtol=1e-3, atol=1e-3)  # something was lost


@pytest.mark.parametrize("width", [1, 8], ids=["step by step", "in one go"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("policy", [*EVICTING, "adakv(window=5, floor=0.0)+h2o@0.5"])
def test_evicting_from_codes_while_decoding_equals_hiding_them(policy, storage, width):
    model, rule = family("llama"), STORAGES[storage](policy_of(policy))
    hook = AttentionHook(model)
    with hook.open():
        held, masks, kept = compressed(hook, rule)
        seen = what_is_seen(hook, evicting_group(rule, kept, storage=rule.store))
        own = feed(hook, evicting_group(rule, kept, storage=rule.store), width)
    expected = stock_steps(model, RoundedCache(held, rule.store, masks), seen)
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)


def shown_of(held: Tensor) -> list[Tensor]:
    """For each token fed, (1, Hq, 1, arrivals): which places of a head were filled."""
    filled = [held + fed for fed in range(1, len(FED) + 1)]  # (Hkv,)
    places = [torch.arange(int(count.max())) < count[:, None] for count in filled]
    return [by_query(shown) for shown in places]


def by_query(shown: Tensor) -> Tensor:
    """(Hkv, arrivals) -> (1, Hq, 1, arrivals)."""
    return shown.repeat_interleave(QUERY_HEADS // len(shown), dim=0)[None, :, None]


def what_is_seen(hook: AttentionHook, group: Group) -> dict[int, list[Tensor]]:
    """For each layer and token fed, (1, Hq, 1, arrivals): which arrivals are still there."""
    seen: dict[int, list[Tensor]] = {index: [] for index in group.caches}
    batch = Batch(hook, [group], [len(PROMPT) - 1])
    for token in FED:
        for index, cache in group.caches.items():
            come = cache.codes.count[0]  # (Hkv,); the newest is the next to arrive
            there = cache.positions[0, :, : int(come.max()) + 1] != EMPTY
            seen[index].append(by_query(there.scatter(1, come[:, None], True)))
        steps(batch, [[token]])
    assert all((~found[-1]).any() for found in seen.values()), "nothing was evicted"
    return seen


@WIDTHS
@pytest.mark.parametrize("storage", STORAGES)
def test_sliding_layers_are_left_alone_and_a_pass_may_be_split(storage, width):
    hook, policy = AttentionHook(family("gemma3")), STORAGES[storage](full())
    with hook.open():
        _, _, kept = compressed(hook, policy)
        group = group_of(policy.store, kept)
        own = feed(hook, group, width)
        alone = feed(hook, group_of(policy.store, kept), width=1)
    torch.testing.assert_close(own, alone, rtol=1e-3, atol=1e-3)
    assert [isinstance(cache, QuantizedCache) for cache in group.caches.values()] == [False, 1, 1]


def bytes_of(storage: Storage, kept: Kept) -> int:
    [size] = Batch(AttentionHook(family("llama")), [group_of(storage, kept)], [0]).bytes
    return size


@pytest.mark.parametrize("policy", ["full", "adakv(window=5, floor=0.0)"])
@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_stored_is_tensors_of_that_many_bytes(storage, policy):
    base = full() if policy == "full" else get_policy(policy)
    hook, store = AttentionHook(family("llama")), STORAGES[storage](base).store
    with hook.open():
        held, masks, kept = compressed(hook, base)
    pairs = [
        (x[held.slot, head, :-1][mask[head, :-1]], codec, coded)
        for layer, mask in zip(held.stack.compressible, masks, strict=True)
        for head in range(2)
        for x, codec, coded in (
            (layer.keys, store.keys, store.coded_keys),
            (layer.values, store.values, store.coded_values),
        )
    ]
    stored = [
        tensor.nbytes
        for tokens, codec, coded in pairs
        for old in [int(coded(torch.tensor(len(tokens))))]
        for tensor in (*codec.encode(tokens[None, :old]), tokens[old:])
    ]
    plain = sum(tokens.nbytes for tokens, _, _ in pairs)
    assert kept.bytes == plain
    assert bytes_of(store, kept) == sum(stored) < plain


def test_bytes_are_those_of_the_papers_arithmetic():
    """40 tokens of 2 heads of 12 channels in 3 layers; 4 bits, groups and a residual of 4."""
    policy = STORAGES["kivi"](full())
    hook = AttentionHook(family("llama"))
    with hook.open():
        _, _, kept = compressed(hook, policy)
    keys = 40 * 12 * 4 // 8 + 10 * 12 * 2 * 4  # codes; scale and zero a channel of 4 tokens
    values = 36 * 12 * 4 // 8 + 36 * 3 * 2 * 4 + 4 * 12 * 4  # the last 4 as they are
    assert bytes_of(policy.store, kept) == 3 * 2 * (keys + values)


def test_layers_at_either_end_cost_what_they_cost_as_they_are():
    """40 tokens of 2 heads of 64 channels in 3 layers; 3 bits and a norm, 4 bits and two floats."""
    policy, hook = get_policy("turboquant(keys=3, skip=1)"), AttentionHook(family(WIDE))
    with hook.open():
        _, _, kept = compressed(hook, policy)
    tokens = 40 * 2
    coded = tokens * (64 * 3 // 8 + 2 + 64 * 4 // 8 + 4)
    assert bytes_of(policy.store, kept) == coded + 2 * tokens * 2 * 64 * 4


@pytest.mark.parametrize(("skip", "plain"), [(0, []), (1, [2]), (2, [2])])
def test_layers_at_either_end_are_counted_with_those_that_slide(skip, plain):
    hook = AttentionHook(family("gemma3"))  # its first layer slides
    policy = get_policy(f"turboquant(skip={skip})")
    with hook.open():
        _, _, kept = compressed(hook, policy)
        caches = group_of(policy.store, kept).caches
    assert [i for i in (1, 2) if caches[i].storage.keys == Plain()] == plain


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_of_a_batch_answer_as_each_does_alone(storage):
    rule = STORAGES[storage](policy_of("knorm"))
    hook = AttentionHook(family("llama"))

    def batch(*kept: Kept) -> Batch:
        return Batch(hook, [group_of(rule.store, *kept)], [len(PROMPT) - 1] * len(kept))

    def alone(kept: Kept, fed: list[int], last: int) -> Tensor:
        rows = batch(kept)
        rows.make_room(len(fed))
        return rows.feed([fed], last=last)[0]

    with hook.open():
        kept = [compressed(hook, rule, ratio)[2] for ratio in (0.3, 0.55, 1.0)]
        fed = [FED[:n] for n in (8, 5, 3)]
        rows = batch(*kept)
        together = rows.feed(fed, last=3)
        more = rows.feed([[5], [6], [7]], last=1)
        rows.take([0, 2])
        after = rows.feed([[8], [9]], last=1)[:, 0]
        apart = [alone(*row, last=3) for row in zip(kept, fed, strict=True)]
        again = [alone(k, [*f, t], 1) for k, f, t in zip(kept, fed, (5, 6, 7), strict=True)]
        ends = [(0, [5, 8]), (2, [7, 9])]
        last = [alone(kept[row], [*fed[row], *end], 1)[0] for row, end in ends]
    torch.testing.assert_close(together, torch.stack(apart), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(more, torch.stack(again), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after, torch.stack(last), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", ["full", "snapkv(window=4)", "h2o", "shotkv(window=4)"])
def test_answers_from_codes_are_those_of_one_token_at_a_time(spec):
    """A row that leaves its draft starts over, and ends where a row without any draft would."""
    base = full() if spec == "full" else get_policy(spec)
    cell = Cell(STORAGES["kivi in 2 bits"](base), 0.5)
    grid, _ = run(family("llama"), prompts(), [cell])
    drafts, own = answers(grid)
    assert own != drafts, "no draft diverged"
    for index, prompt in enumerate(prompts()):
        assert own[index] == without_draft(cell, prompt)
    split, _ = run(family("llama"), prompts(), [cell], memory=1)
    assert answers(split)[1] == own


def test_a_storage_alone_saves_the_bytes_it_is_judged_by():
    cell = Cell(STORAGES["int8"](full()), 1.0)
    grid, _ = run(family("llama"), prompts(), [cell])
    outcome = grid.cells[0]
    assert outcome.bytes_held * 32 * 12 == outcome.bytes_full * (8 * 12 + 2 * 32)
    assert all(held.min() == 1 for held in outcome.held)
