"""Evicting must give what hiding would: stock transformers with a mask is the oracle."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.cache.base import Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.draft import DraftCache
from pytest_kvguard.engine.cache.evicting import EvictingCache
from pytest_kvguard.engine.cache.group import Group
from pytest_kvguard.engine.cache.shared import SharedPrefixCache
from pytest_kvguard.engine.grid import About, Prompt
from pytest_kvguard.engine.model import AttentionHook, find_rotation
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.engine.select import Kept, importances, keep, keep_masks
from pytest_kvguard.engine.stack import Prefill
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import EMPTY, Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.observe import window_attention
from pytest_kvguard.policies.selectors import top_tokens
from tests.engine.stock import (
    ANSWER,
    EVICTING,
    FED,
    POLICY_NAMES,
    PROMPT,
    RATIO,
    compressed,
    evicting_group,
    feed,
    hidden_by,
    plain_logits,
    policy_of,
    steps,
    stock_logits,
    stock_logits_of,
)
from tests.tiny import FAMILIES, family, llama

WIDTHS = pytest.mark.parametrize("width", [1, 3, 8], ids=["step by step", "in threes", "in one go"])


@pytest.mark.parametrize("cache", [DenseCache, SharedPrefixCache])
@WIDTHS
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_evicting_at_prefill_equals_masking_in_every_family(name, width, cache):
    check_prefill_eviction(family(name), policy_of("snapkv"), width, cache)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_reading_a_draft_equals_masking_in_every_family(name):
    check_prefill_eviction(family(name), policy_of("snapkv"), len(FED), DraftCache)


@pytest.mark.parametrize("cache", [DenseCache, SharedPrefixCache, DraftCache])
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_evicting_at_prefill_equals_masking_under_every_policy(policy, cache):
    check_prefill_eviction(family("llama"), policy_of(policy), len(FED), cache)


def check_prefill_eviction(
    model: PreTrainedModel, policy: Policy, width: int, cache: type = DenseCache
) -> None:
    hook = AttentionHook(model)
    with hook.open():
        held, masks, kept = compressed(hook, policy)
        own = feed(hook, group_of(kept, cache), width)
    expected = stock_logits_of(masks, held, model)
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(own, plain_logits(model), rtol=1e-2, atol=1e-2)  # something was lost


def group_of(kept: Kept, cache: type) -> Group:
    """One row with room for two tokens at first: then it grows."""
    sliding = DenseCache if cache is SharedPrefixCache else None
    return Group.of(Rows([kept]), cache, sliding=sliding, capacity=2)


def test_heads_may_keep_different_counts():
    """What a head did not keep stays hidden, even where its sibling keeps more."""

    def select(importance, n, state):
        mask = top_tokens(importance, n, state)
        mask[0] = top_tokens(importance, n // 3, state)[0]
        return mask

    ragged = Policy("ragged", lambda state: -state.keys.norm(dim=-1), keep_ratio, select)
    for cache in (DenseCache, SharedPrefixCache, DraftCache):
        check_prefill_eviction(family("llama"), ragged, len(FED), cache)
    check_prefill_eviction(family("llama"), ragged, width=3)


RAGGED = ["adakv(window=5, floor=0.0)+h2o@0.5", "adapyramidkv(window=5, floor=0.0)+tova@0.4"]


@pytest.mark.parametrize("width", [1, 8], ids=["step by step", "in one go"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("policy", [*EVICTING, *RAGGED])
def test_evicting_while_decoding_equals_masking(policy, name, width):
    model, rule = family(name), policy_of(policy)
    hook = AttentionHook(model)
    with hook.open():
        held, _, kept = compressed(hook, rule)
        seen = what_is_seen(hook, rule, held, kept)
        own = feed(hook, evicting_group(rule, kept), width)
    expected = stock_logits(model, hidden_by(seen, held, model))
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)


def what_is_seen(
    hook: AttentionHook, policy: Policy, held: Prefill, kept: Kept
) -> dict[int, list[Tensor]]:
    """Watch the slots while the answer is fed: for each token, which positions are there."""
    seen: dict[int, list[Tensor]] = {layer.layer: [] for layer in held.stack.compressible}
    group, total = evicting_group(policy, kept), len(PROMPT) + len(ANSWER)
    batch = Batch(hook, [group], [len(PROMPT) - 1])
    for at, token in enumerate(FED, start=len(PROMPT) - 1):
        for index, found in seen.items():
            positions = group.caches[index].positions[0]  # (Hkv, C)
            mask = torch.zeros(len(positions), total + 1, dtype=torch.bool)
            mask.scatter_(1, torch.where(positions == EMPTY, total, positions), True)
            mask[:, at] = True
            found.append(mask[:, :total])
        steps(batch, [[token]])
    gone = [len(found[0][0]) and int((~found[-1]).sum()) for found in seen.values()]
    assert min(gone) > 0, "nothing was evicted, so the oracle would prove nothing"
    return seen


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_policies_see_the_attention_the_model_computed(name):
    hook = AttentionHook(family(name))
    with hook.open():
        [held] = prefill(hook, [Wanted(tuple(PROMPT))], Observe(window=9, sums=True))
    states = held.states(About(), torch.zeros(len(PROMPT), dtype=torch.bool))
    own = own_attention(name)
    for layer, state in zip(held.stack.compressible, states, strict=True):
        expected = own[layer.layer][0]  # (Hq, T, T)
        seen = window_attention(state, 9).flatten(0, 1)
        torch.testing.assert_close(seen, expected[:, -9:], rtol=1e-4, atol=1e-5)
        sums = expected.double().sum(dim=1).float()
        torch.testing.assert_close(state.attention_sums, sums, rtol=1e-4, atol=1e-4)


def own_attention(name: str) -> tuple[Tensor, ...]:
    """Attention of the same weights under transformers' eager implementation."""
    eager = FAMILIES[name]()
    eager.set_attn_implementation("eager")
    with torch.inference_mode():
        return eager(torch.tensor([PROMPT]), output_attentions=True).attentions


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_policies_see_what_the_output_projection_makes_of_each_head(name):
    model = family(name)
    hook, entered, left = AttentionHook(model), {}, {}

    def watch(module, args, output):
        entered[module], left[module] = (
            args[0],
            output - (0 if module.bias is None else module.bias),
        )

    projections = {m: n for n, m in model.named_modules() if n.endswith(("o_proj", "dense"))}
    hooks = [module.register_forward_hook(watch) for module in projections]
    try:
        with hook.open():
            [held] = prefill(hook, [Wanted(tuple(PROMPT))], Observe())
    finally:
        for each in hooks:
            each.remove()
    found = [layer.output for layer in held.stack.layers.values()]
    seen = [module for module in projections if module in entered]
    assert len(seen) == len(found) > 0
    for output, module in zip(found, seen, strict=True):
        heads = entered[module][0].unflatten(-1, output.shape[:2])  # (T, Hq, D)
        made = torch.einsum("thd,hdm->tm", heads, output)
        torch.testing.assert_close(made, left[module][0], rtol=1e-4, atol=1e-5)


def test_sums_go_on_while_decoding(monkeypatch):
    """H2O's sums: every query since the prompt's first, for each position still held."""
    model, rule = family("llama"), policy_of("h2o")
    hook = AttentionHook(model)
    seen: list[tuple[Tensor, Tensor]] = []
    evict = EvictingCache._evict

    def watching(cache, weights, newest, *, padded):
        if cache is group.caches[0]:
            seen.append((weights[0].clone(), cache.positions[0].clone()))
        evict(cache, weights, newest, padded=padded)

    monkeypatch.setattr(EvictingCache, "_evict", watching)
    with hook.open():
        held, _, kept = compressed(hook, rule)
        group = evicting_group(rule, kept)
        feed(hook, group, width=1)
    assert len(seen) == len(FED)
    heads, groups = 2, 2
    expected = held.sums[0].double().reshape(heads, groups, -1).sum(dim=1)
    expected = torch.cat([expected, torch.zeros(heads, len(ANSWER))], dim=1)
    again = len(PROMPT) - 1  # fed once more: counts for itself, the others had it at prefill
    expected[:, again] = 0
    for step, (attention, positions) in enumerate(seen):
        for head in range(heads):
            for slot, position in enumerate(positions[head].tolist()):
                if position != EMPTY and (step > 0 or position == again):
                    mass = attention[head * groups : (head + 1) * groups, slot].double().sum()
                    expected[head, position] += mass
    cache = group.caches[0]
    for head in range(heads):
        there = cache.positions[0, head] != EMPTY
        own = cache.sums[0, head, there].double()
        torch.testing.assert_close(
            own, expected[head, cache.positions[0, head, there]], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("cache", [DenseCache, DraftCache])
def test_cache_positions_equal_the_text_that_is_left(cache):
    """With one layer, what a token holds depends on itself alone: evicting is leaving out."""
    model, own, masks = in_cache_positions(cache)
    left = [t for t, stays in zip(PROMPT, masks[0][0].tolist(), strict=True) if stays]
    assert left == PROMPT[:3] + PROMPT[-17:]
    with torch.inference_mode():
        expected = model(torch.tensor([left + ANSWER])).logits[0, len(left) - 1 :]
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)


def test_cache_positions_go_on_while_the_window_rolls():
    """After every eviction the sinks move up, so that no token is ever further than the cache."""
    model, own, _ = in_cache_positions(None)
    text = PROMPT + ANSWER
    for row, logits in enumerate(own):
        end = len(PROMPT) + row
        left = text[:3] + text[end - 17 : end]
        with torch.inference_mode():
            expected = model(torch.tensor([left])).logits[0, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def in_cache_positions(cache: type | None) -> tuple[PreTrainedModel, Tensor, list[Tensor]]:
    """Feed the answer to a one-layer model under StreamingLLM; None: rolling on as it decodes."""
    model = llama(num_hidden_layers=1)
    rule = get_policy("streaming_llm(sinks=3, positions=cache)")
    hook = AttentionHook(model)
    with hook.open():
        rotation = find_rotation(hook)
        prompt = Prompt(tuple(PROMPT), context=0)
        [held] = prefill(hook, [Wanted(prompt.ids)], Observe())
        states = held.states(About(), prompt.protection(rule, torch.device("cpu")))
        masks = keep_masks(rule, importances(rule, states), states, RATIO)
        kept = keep(held, masks, [20], prompt.fed, rotation)
        group = group_of(kept, cache) if cache else evicting_group(rule, kept, rotation)
        own = feed(hook, group, width=len(FED) if cache is DraftCache else 1)
    return model, own, masks
