"""The same prompt through kvpress and through us: what each keeps, layer by layer, head by head.

kvpress reads the prompt with its hooks on a stock model; we prefill the same model through our own
attention. docs/kvpress.md says where the definitions differ; what is here is where they agree.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pytest_kvguard.engine.grid import UNKNOWN
from pytest_kvguard.engine.model import AttentionHook, cache_argument
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.engine.select import importances, keep_masks
from pytest_kvguard.models import load
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import LayerState, Policy
from tests.tiny import VOCABULARY, family, llama

kvpress = pytest.importorskip(
    "kvpress", reason="kvpress pins transformers < 5.3, so it needs an environment of its own"
)

PROMPT = torch.randperm(VOCABULARY - 3, generator=torch.Generator().manual_seed(0))[:80].add(3)
"""No token twice: equal tokens have equal key norms in the first layer."""
HALF, LESS = 0.5, 0.25


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "reasoner"])
@pytest.mark.parametrize("ratio", [HALF, LESS])
@pytest.mark.parametrize(
    ("spec", "press", "settings"),
    [
        ("snapkv(window=16)", "SnapKVPress", {"window_size": 16}),
        ("snapkv(window=8, kernel=3)", "SnapKVPress", {"window_size": 8, "kernel_size": 3}),
        ("keydiff", "KeyDiffPress", {}),
        ("streaming_llm(sinks=4)", "StreamingLLMPress", {"n_sink": 4}),
        ("expected_attention(future=64)", "ExpectedAttentionPress", {"n_future_positions": 64}),
        (
            "expected_attention(future=512, sinks=9)",
            "ExpectedAttentionPress",
            {"n_future_positions": 512, "n_sink": 9},
        ),
    ],
    ids=str,
)
def test_a_policy_keeps_what_its_press_keeps(spec, press, settings, name, ratio):
    model = load("reasoner").model if name == "reasoner" else family(name)
    check_equal(model, spec, ratio, getattr(kvpress, press)(1 - ratio, **settings))


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("ratio", [HALF, LESS])
def test_knorm_is_equal_where_a_model_does_not_normalise_its_keys(name, ratio):
    check_equal(family(name), "knorm", ratio, kvpress.KnormPress(1 - ratio))


@pytest.mark.parametrize("ratio", [HALF, LESS])
def test_tova_is_equal_once_its_last_position_is_protected(ratio):
    last = (len(PROMPT) - 1,)
    check_equal(family("llama"), "tova", ratio, kvpress.TOVAPress(1 - ratio), protected=last)


@pytest.mark.parametrize("ratio", [HALF, LESS])
def test_observed_attention_is_equal(ratio):
    eager = llama()
    eager.set_attn_implementation("eager")
    press = kvpress.ObservedAttentionPress(1 - ratio)
    check_equal(eager, "observed_attention", ratio, press)


@pytest.mark.parametrize("per_run", [1, 4, 9])
def test_lagkv_is_equal_where_every_run_keeps_equally_many(per_run):
    ratio = (4 + 5 * per_run + 12 + 4) / len(PROMPT)  # sinks, five runs, the last and what is over
    press = kvpress.LagKVPress(1 - ratio, n_sink=4, lag_size=12)
    check_equal(family("llama"), "lagkv(sinks=4, lag=12)", ratio, press)


@pytest.mark.parametrize("ratio", [HALF, LESS])
def test_chunkkv_is_equal_without_pooling_where_the_window_is_whole_chunks(ratio):
    host = kvpress.SnapKVPress(1 - ratio, window_size=10, kernel_size=1)
    press = kvpress.ChunkKVPress(host, chunk_length=5)
    check_equal(family("llama"), "chunkkv(window=10, length=5, reuse=1)", ratio, press)


@pytest.mark.parametrize("ratio", [HALF, LESS])
@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
def test_adakv_is_equal_whatever_the_floor(floor, ratio):
    host = kvpress.SnapKVPress(1 - ratio, window_size=8)
    press = kvpress.AdaKVPress(host, alpha_safeguard=floor)
    masks = check_equal(family("llama"), f"adakv(window=8, floor={floor})", ratio, press)
    if floor < 1:
        assert any(len(set(mask.sum(dim=-1).tolist())) > 1 for mask in masks), "heads kept alike"


@pytest.mark.parametrize("first", [0.0, 0.5])
def test_criticalkv_is_equal_where_the_window_fits_the_first_stage_or_is_one_position(first):
    window = 16 if first else 1
    host = kvpress.SnapKVPress(1 - HALF, window_size=window)
    press = kvpress.CriticalKVPress(host, first_stage_ratio=first)
    check_equal(family("llama"), f"criticalkv(window={window}, first={first})", HALF, press)


@pytest.mark.parametrize(("window", "beta"), [(2, 20), (4, 5)])
def test_pyramidkv_ranks_alike_in_budgets_that_are_reckoned_otherwise(window, beta):
    press = kvpress.PyramidKVPress(1 - HALF, window_size=window, beta=beta)
    theirs = kept_by_press(press, family("llama"))
    policy = get_policy(f"pyramidkv(window={window}, beta={beta})")
    states = states_of(policy, family("llama"))
    budgets = [int(mask[0].sum()) for mask in theirs]
    assert budgets[0] > budgets[1] > budgets[2], "kvpress fell back to SnapKV"
    for state, budget, mask in zip(states, budgets, theirs, strict=True):
        assert torch.equal(policy.select(policy.importance(state), budget, state), mask)
    ours = [policy.budget(state, HALF) for state in states]
    assert sum(ours) <= sum(budgets) + 1
    assert all(abs(own - other) <= window for own, other in zip(ours, budgets, strict=True))


def check_equal(
    model: PreTrainedModel,
    spec: str,
    ratio: float,
    press: object,
    protected: tuple[int, ...] = (),
) -> list[Tensor]:
    policy = get_policy(spec)
    states = states_of(policy, model, protected)
    ratings = importances(policy, states)
    ours = keep_masks(policy, ratings, states, ratio)
    theirs = kept_by_press(press, model)
    assert len(ours) == len(theirs) == model.config.num_hidden_layers
    for own, other, rating in zip(ours, theirs, ratings, strict=True):
        assert own.shape == other.shape
        assert int(own.sum()) == round(ratio * own.numel())
        assert torch.equal(own, other) or all(map(only_ties_differ, own, other, rating))
    return ours


def only_ties_differ(own: Tensor, other: Tensor, rating: Tensor) -> bool:
    """Whether a head keeps equally rated positions both ways: kvpress leaves open which of them."""
    return torch.equal(rating[own].sort().values, rating[other].sort().values)


def states_of(
    policy: Policy, model: PreTrainedModel, protected: tuple[int, ...] = ()
) -> tuple[LayerState, ...]:
    hook, wanted = AttentionHook(model), Wanted(tuple(PROMPT.tolist()))
    with hook.open():
        [held] = prefill(hook, [wanted], Observe(policy.window, policy.needs_sums))
        turn = hook.rotation().turn if policy.needs_turn else None
    mask = torch.zeros(len(PROMPT), dtype=torch.bool)
    mask[list(protected)] = True
    return held.states(UNKNOWN, mask, turn)


def kept_by_press(press, model: PreTrainedModel) -> list[Tensor]:
    """Return what a press leaves of every layer's cache, (Hkv, T) bool each."""
    with torch.inference_mode(), watched(press) as masks, press(model):
        model(PROMPT[None], use_cache=True, **cache_argument(model, DynamicCache()))
    return [masks[layer] for layer in sorted(masks)]


@contextmanager
def watched(press) -> Iterator[dict[int, Tensor]]:
    """Compare the keys a press is given with those it returns, and see what it hides."""
    masks: dict[int, Tensor] = {}
    compress = press.compress

    def watching(module, hidden_states, keys, values, attentions, kwargs):
        left = compress(module, hidden_states, keys, values, attentions, kwargs)
        same = (keys[0][:, :, None] == left[0][0][:, None]).all(dim=-1)  # (Hkv, T, n)
        assert same.any(dim=1).all(), "a key that was not there before"
        masks[module.layer_idx] = same.any(dim=2)
        hidden = getattr(module, "masked_key_indices", None)
        if hidden is not None:
            masks[module.layer_idx][hidden[1], hidden[2]] = False
            module.masked_key_indices = None
        return left

    press.compress = watching
    try:
        yield masks
    finally:
        del press.compress
