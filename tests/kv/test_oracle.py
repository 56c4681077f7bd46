"""Evicting must give what hiding would: stock transformers with a mask is the oracle."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_kvguard.kv.borrowing import borrowing
from pytest_kvguard.kv.compress import Kept, importances, keep, keep_masks
from pytest_kvguard.kv.evicting import Decoding, EvictingLayer, evicting
from pytest_kvguard.kv.grid import Cell, Prompt
from pytest_kvguard.kv.prefill import About, Observe, Prefill, prefill
from pytest_kvguard.kv.rope import Rotation, find_rotation
from pytest_kvguard.kv.rows import GrowingLayer, RaggedLayer, RowLayer, Rows
from pytest_kvguard.kv.seam import Seam
from pytest_kvguard.kv.sharing import SharingLayer
from pytest_kvguard.policies import POLICIES, get_policy
from pytest_kvguard.policies.base import EMPTY, Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.observe import window_attention
from pytest_kvguard.policies.selectors import top_tokens
from tests.tiny import FAMILIES, WINDOW, family, llama, tokens

PROMPT = tokens(41)
ANSWER = tokens(7, seed=1)
UNITS = tuple((range(start, start + 6),) for start in range(2, 32, 6))
RATIO = 0.5
SMALL = {
    "snapkv": "(window=5)",
    "pyramidkv": "(window=5)",
    "scope": "(window=3, recent=2)",
    "adakv": "(window=5)",
    "adapyramidkv": "(window=5)",
    "criticalkv": "(window=5)",
    "chunkkv": "(window=5, length=4)",
    "lagkv": "(sinks=2, lag=5)",
    "vatp": "(sinks=2)",
}
POLICY_NAMES = sorted(n for n in POLICIES if get_policy(n).saves == "positions")


def policy_of(name: str) -> Policy:
    return get_policy(name + SMALL.get(name, ""))


def compressed(seam: Seam, policy: Policy, ratio: float = RATIO) -> tuple[Prefill, list, Kept]:
    prompt = Prompt(tuple(PROMPT), context=0, about=About(units=UNITS))
    held = prefill(seam, PROMPT, Observe(policy.window, policy.needs_sums))
    turn = find_rotation(seam).turn if policy.needs_turn else None
    states = held.states(prompt.about, prompt.protection(policy, torch.device("cpu")), turn)
    masks = keep_masks(policy, importances(policy, states), states, ratio)
    budgets = [policy.budget(state, ratio) for state in states]
    return held, masks, keep(held, masks, budgets, prompt.fed)


def attentions(model: PreTrainedModel) -> list[torch.nn.Module]:
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and "Attention" in str(type(m))]
    return sorted(found, key=lambda m: m.layer_idx)


@contextmanager
def masked(model: PreTrainedModel, masks: dict[int, Tensor]) -> Iterator[None]:
    """Give each attention layer of a stock model its own (1, Hq, Q, T) mask."""

    def swap(module, args, kwargs):
        return args, {**kwargs, "attention_mask": masks[module.layer_idx]}

    hooks = [m.register_forward_pre_hook(swap, with_kwargs=True) for m in attentions(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stock_logits(model: PreTrainedModel, masks: dict[int, Tensor]) -> Tensor:
    """What the untouched model says to the tokens fed after compression, (1 + len(ANSWER), V)."""
    ids = torch.tensor([PROMPT + ANSWER])
    with torch.inference_mode(), masked(model, masks):
        return model(ids).logits[0, len(PROMPT) - 1 :]


def hidden_by(kept: dict[int, list[Tensor]], held: Prefill, heads: int) -> dict[int, Tensor]:
    """Masks of a stock model: causal, and each fed token sees only what ``kept`` says.

    kept: for each compressible layer, for each fed token, (Hkv, T + fed) bool.
    """
    total, first = len(PROMPT) + len(ANSWER), len(PROMPT) - 1
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    masks = {}
    for layer in held.layers:
        mask = causal.expand(1, heads, -1, -1).clone()
        if layer.window is not None:
            mask &= ~torch.ones(total, total, dtype=torch.bool).tril(-WINDOW)
        else:
            for row, seen in enumerate(kept[layer.layer]):
                mask[0, :, first + row] &= seen.repeat_interleave(heads // seen.shape[0], dim=0)
        masks[layer.layer] = mask
    return masks


def feed(seam: Seam, rows: Rows, width: int) -> Tensor:
    """Feed the prompt's last token and the answer, ``width`` tokens at a time."""
    fed = [PROMPT[-1], *ANSWER]
    pieces = [fed[at : at + width] for at in range(0, len(fed), width)]
    return torch.cat([rows.feed(seam, [p], last=len(p))[0] for p in pieces])


@pytest.mark.parametrize("width", [1, 3, 8], ids=["step by step", "in threes", "in one go"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_evicting_at_prefill_equals_masking_in_every_family(name, width):
    check_prefill_eviction(family(name), policy_of("snapkv"), width)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_evicting_at_prefill_equals_masking_under_every_policy(policy):
    check_prefill_eviction(family("llama"), policy_of(policy), width=8)


def check_prefill_eviction(model: PreTrainedModel, policy: Policy, width: int) -> None:
    seam = Seam(model)
    with seam.open():
        held, masks, kept = compressed(seam, policy)
        own = feed(seam, Rows([kept]), width)
    after = torch.ones(len(ANSWER) + 1, dtype=torch.bool)  # what is fed sees what was fed
    seen = {
        layer.layer: [torch.cat([m[:, :-1], after.expand(len(m), -1)], dim=1)] * (len(ANSWER) + 1)
        for layer, m in zip(held.compressible, masks, strict=True)
    }
    expected = stock_logits(model, hidden_by(seen, held, model.config.num_attention_heads))
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(own, plain_logits(model), rtol=1e-2, atol=1e-2)  # something was lost


@pytest.mark.parametrize("spec", ["snapkv(window=5)", "adakv(window=5)", "observed_attention"])
@pytest.mark.parametrize("ratios", [(0.5,), (0.25, 0.5, 0.75), (0.8, 1.0)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_of_one_prefill_see_what_each_keeps_and_nothing_else(name, ratios, spec):
    """One that goes on by itself copies what it keeps, several look at the prefill together."""
    model = family(name)
    seam, policy, fed = Seam(model), get_policy(spec), [PROMPT[-1], *ANSWER]
    prompt = Prompt(tuple(PROMPT), context=0)
    with seam.open():
        held = prefill(seam, PROMPT, Observe(policy.window, policy.needs_sums))
        states = held.states(prompt.about, prompt.protection(policy, torch.device("cpu")))
        rated = importances(policy, states)
        masks = [keep_masks(policy, rated, states, ratio) for ratio in ratios]
        budgets = [[policy.budget(state, ratio) for state in states] for ratio in ratios]
        kept = [keep(held, *row, prompt.fed) for row in zip(masks, budgets, strict=True)]
        rows = Rows(kept, borrowing)
        first = rows.feed(seam, [fed[:4]] * len(kept), last=4)
        rows.rewind([len(PROMPT) + 1] * len(kept))  # two of these were a draft
        rows.own(2)  # grows when that is full
        parts = [part for layer in rows.layers.values() for part in parts_of(layer)]
        assert any(isinstance(part, SharingLayer) for part in parts) == (sum(ratios) > 1)
        rows.take(range(len(kept)))
        later = [rows.feed(seam, [fed[at : at + 1]] * len(kept), last=1) for at in range(2, 6)]
        rows.take([len(kept) - 1])
        alone = [rows.feed(seam, [fed[6:7]], last=1), rows.feed(seam, [fed[7:]], last=1)]
    after = torch.ones(len(fed), dtype=torch.bool)  # what is fed sees what was fed
    for row, chosen in enumerate(masks):
        seen = {
            layer.layer: [torch.cat([m[:, :-1], after.expand(len(m), -1)], dim=1)] * len(fed)
            for layer, m in zip(held.compressible, chosen, strict=True)
        }
        hidden = hidden_by(seen, held, model.config.num_attention_heads)
        expected = stock_logits(model, hidden)
        own = torch.cat([first[row, :2], *(step[row] for step in later)])
        if row == len(kept) - 1:
            own = torch.cat([own, *(step[0] for step in alone)])
        torch.testing.assert_close(own, expected[: len(own)], rtol=1e-3, atol=1e-3)


def parts_of(layer: RowLayer) -> list[RowLayer]:
    layers = layer.heads if isinstance(layer, RaggedLayer) else [layer]
    return [part for each in layers for _, part in each.parts]


def plain_logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([PROMPT + ANSWER])).logits[0, len(PROMPT) - 1 :]


EVICTING = [
    *(n for n in POLICY_NAMES if policy_of(n).decode is not None),
    "snapkv(window=5)+h2o",
    "snapkv(window=5)+tova",
    "shotkv(window=5)+h2o@0.4",
    "shotkv+scope(strategy=discontinuous, window=3, recent=2, every=3)",
]
RAGGED = ["adakv(window=5, floor=0.0)+h2o@0.5", "adapyramidkv(window=5, floor=0.0)+tova@0.4"]


@pytest.mark.parametrize("width", [1, 8], ids=["step by step", "in one go"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", [*EVICTING, *RAGGED])
def test_evicting_while_decoding_equals_masking(policy, name, width):
    model, rule = family(name), policy_of(policy)
    seam = Seam(model)
    with seam.open():
        held, _, kept = compressed(seam, rule)
        seen = what_is_seen(seam, rule, held, kept)
        own = feed(seam, rows_of(rule, kept), width)
    expected = stock_logits(model, hidden_by(seen, held, model.config.num_attention_heads))
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)


def rows_of(policy: Policy, kept: Kept) -> Rows:
    return Rows([kept], evicting(decoding_of(policy, kept)))


def decoding_of(policy: Policy, kept: Kept, rotation: Rotation | None = None) -> Decoding:
    ratio = Cell(policy, RATIO).decode_ratio
    return Decoding(
        eviction=policy.decode,
        ratio=torch.tensor([ratio], dtype=torch.float64),
        prompt_length=torch.tensor([len(PROMPT)]),
        fresh=torch.tensor([len(PROMPT)]),
        new=(len(ANSWER) + 1,),
        rotation=rotation,
    )


def what_is_seen(seam: Seam, policy: Policy, held: Prefill, kept: Kept) -> dict[int, list[Tensor]]:
    """Watch the slots while the answer is fed: for each token, which positions are there."""
    rows, total = rows_of(policy, kept), len(PROMPT) + len(ANSWER)
    seen: dict[int, list[Tensor]] = {layer.layer: [] for layer in held.compressible}
    for at, token in enumerate([PROMPT[-1], *ANSWER], start=len(PROMPT) - 1):
        for index, found in seen.items():
            positions = rows.layers[index].positions[0]  # (Hkv, C)
            mask = torch.zeros(len(positions), total + 1, dtype=torch.bool)
            mask.scatter_(1, torch.where(positions == EMPTY, total, positions), True)
            mask[:, at] = True
            found.append(mask[:, :total])
        rows.feed(seam, [[token]], last=1)
    gone = [len(found[0][0]) and int((~found[-1]).sum()) for found in seen.values()]
    assert min(gone) > 0, "nothing was evicted, so the oracle would prove nothing"
    return seen


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_policies_see_the_attention_the_model_computed(name):
    model = family(name)
    seam = Seam(model)
    with seam.open():
        held = prefill(seam, PROMPT, Observe(window=9, sums=True))
    states = held.states(About(), torch.zeros(len(PROMPT), dtype=torch.bool))
    own = own_attention(name)
    for layer, state in zip(held.compressible, states, strict=True):
        expected = own[layer.layer][0]  # (Hq, T, T)
        seen = window_attention(state, 9).flatten(0, 1)
        torch.testing.assert_close(seen, expected[:, -9:], rtol=1e-4, atol=1e-5)
        sums = expected.double().sum(dim=1).float()
        torch.testing.assert_close(state.attention_sums, sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_policies_see_what_the_output_projection_makes_of_each_head(name):
    model = family(name)
    seam, entered, left = Seam(model), {}, {}

    def watch(module, args, output):
        entered[module], left[module] = (
            args[0],
            output - (0 if module.bias is None else module.bias),
        )

    projections = {m: n for n, m in model.named_modules() if n.endswith(("o_proj", "dense"))}
    hooks = [module.register_forward_hook(watch) for module in projections]
    try:
        with seam.open():
            held = prefill(seam, PROMPT, Observe())
    finally:
        for hook in hooks:
            hook.remove()
    found = [layer.output for layer in held.layers]
    seen = [module for module in projections if module in entered]
    assert len(seen) == len(found) > 0
    for output, module in zip(found, seen, strict=True):
        heads = entered[module][0].unflatten(-1, output.shape[:2])  # (T, Hq, D)
        made = torch.einsum("thd,hdm->tm", heads, output)
        torch.testing.assert_close(made, left[module][0], rtol=1e-4, atol=1e-5)


def own_attention(name: str) -> tuple[Tensor, ...]:
    """Attention of the same weights under transformers' eager implementation."""
    eager = FAMILIES[name]()
    eager.set_attn_implementation("eager")
    with torch.inference_mode():
        return eager(torch.tensor([PROMPT]), output_attentions=True).attentions


def test_heads_may_keep_different_counts():
    """What a head did not keep stays hidden, even where its sibling keeps more."""

    def select(importance, n, state):
        mask = top_tokens(importance, n, state)
        mask[0] = top_tokens(importance, n // 3, state)[0]
        return mask

    ragged = Policy("ragged", lambda state: -state.keys.norm(dim=-1), keep_ratio, select)
    check_prefill_eviction(family("llama"), ragged, width=3)


def test_sums_go_on_while_decoding():
    """H2O's sums: every query since the prompt's first, for each position still held."""
    model, rule = family("llama"), policy_of("h2o")
    seam = Seam(model)
    seen: list[tuple[Tensor, Tensor]] = []

    class Watching(EvictingLayer):
        def _evict(self, attention: Tensor, newest: Tensor) -> None:
            if self is rows.layers[0]:
                seen.append((attention[0].clone(), self.positions[0].clone()))
            super()._evict(attention, newest)

    with seam.open():
        held, _, kept = compressed(seam, rule)
        decoding = decoding_of(rule, kept)
        rows = Rows([kept], lambda layers: Watching(layers, decoding))
        feed(seam, rows, width=1)
    heads, group = 2, 2
    expected = held.layers[0].sums.double().reshape(heads, group, -1).sum(dim=1)
    expected = torch.cat([expected, torch.zeros(heads, len(ANSWER))], dim=1)
    again = len(PROMPT) - 1  # fed once more: counts for itself, the others had it at prefill
    expected[:, again] = 0
    for step, (attention, positions) in enumerate(seen):
        for head in range(heads):
            for slot, position in enumerate(positions[head].tolist()):
                if position != EMPTY and (step > 0 or position == again):
                    mass = attention[head * group : (head + 1) * group, slot].double().sum()
                    expected[head, position] += mass
    layer = rows.layers[0]
    for head in range(heads):
        there = layer.positions[0, head] != EMPTY
        own = layer.sums[0, head, there].double()
        torch.testing.assert_close(
            own, expected[head, layer.positions[0, head, there]], rtol=1e-4, atol=1e-4
        )


def test_cache_positions_equal_the_text_that_is_left():
    """With one layer, what a token holds depends on itself alone: evicting is leaving out."""
    model, own, masks = in_cache_positions(GrowingLayer)
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


def in_cache_positions(layer: type | None) -> tuple[PreTrainedModel, Tensor, list]:
    """Feed the answer to a one-layer model under StreamingLLM; None: rolling on as it decodes."""
    model = llama(num_hidden_layers=1)
    rule = get_policy("streaming_llm(sinks=3, positions=cache)")
    seam = Seam(model)
    with seam.open():
        rotation = find_rotation(seam)
        prompt = Prompt(tuple(PROMPT), context=0)
        held = prefill(seam, PROMPT, Observe())
        states = held.states(About(), prompt.protection(rule, torch.device("cpu")))
        masks = keep_masks(rule, importances(rule, states), states, RATIO)
        kept = keep(held, masks, [20], prompt.fed, rotation)
        make = layer or evicting(decoding_of(rule, kept, rotation))
        own = feed(seam, Rows([kept], make), width=1)
    return model, own, masks
