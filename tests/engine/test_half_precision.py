"""Half precision has oracles of its own: the stock model in the same type.

Two ways of rounding to half precision differ in every logit, so the rule is this. TOLERANCE says
by how many of the type's steps at the size of the logits, from one number to the next (eps), a
logit may differ from the stock model's. A token may differ from the one the stock model would
choose only where the stock model's two top logits lie closer than that.
"""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytest_kvguard.engine.cache.base import Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.draft import DraftCache
from pytest_kvguard.engine.cache.group import Group
from pytest_kvguard.engine.cache.shared import SharedPrefixCache
from pytest_kvguard.engine.model import AttentionHook
from tests.engine.grids import EVERY_CACHE, STOPPING, answers, cells, outcomes, prompts, run
from tests.engine.stock import compressed, feed, plain_logits, policy_of, stock_logits_of
from tests.tiny import FAMILIES, llama

TOLERANCE = 8  # steps of the type at the size of the largest logit; 0.6 to 5.2 on an x86 CPU
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def in_half(name: str, dtype: torch.dtype) -> PreTrainedModel:
    return FAMILIES[name]().to(dtype)


def tolerance(stock: Tensor, dtype: torch.dtype) -> float:
    """What a logit may be off, for logits of this size."""
    return TOLERANCE * torch.finfo(dtype).eps * float(stock.float().abs().max())


def check_alike(own: Tensor, stock: Tensor, dtype: torch.dtype) -> None:
    """Logits (n, V) differ by rounding, and so do the tokens they choose."""
    assert own.dtype == stock.dtype == dtype
    near = tolerance(stock, dtype)
    assert float((own.float() - stock.float()).abs().max()) <= near
    check_choices(own.argmax(dim=-1), stock, near)


def check_choices(chosen: Tensor, stock: Tensor, near: float) -> None:
    """Each token (n,) is the stock model's (n, V), or its two top logits are a near-tie."""
    top = stock.float().topk(2, dim=-1).values
    differs = chosen != stock.argmax(dim=-1)
    assert bool((top[:, 0] - top[:, 1] < near)[differs].all())
    behind = top[:, 0] - stock.float().gather(1, chosen[:, None])[:, 0]
    assert float(behind.max()) < near


@HALVES
@pytest.mark.parametrize("cache", [DenseCache, SharedPrefixCache, DraftCache])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_evicting_equals_masking_in_half_precision(name, cache, dtype):
    model = in_half(name, dtype)
    hook, width = AttentionHook(model), 8 if cache is DraftCache else 1
    with hook.open():
        held, masks, kept = compressed(hook, policy_of("snapkv"))
        sliding = DenseCache if cache is SharedPrefixCache else None
        own = feed(hook, Group.of(Rows([kept]), cache, sliding=sliding, capacity=2), width)
    stock = stock_logits_of(masks, held, model)
    check_alike(own, stock, dtype)
    lost = (plain_logits(model).float() - stock.float()).abs().amax(dim=-1)
    assert float(lost.max()) > 2 * tolerance(stock, dtype)  # hiding is no rounding


@HALVES
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_baseline_is_what_the_stock_model_generates_up_to_near_ties(name, dtype):
    model = in_half(name, dtype)
    grid, _ = run(model, prompts(), [])
    for index, prompt in enumerate(prompts()):
        own = grid.baseline.answers[index].tokens
        ids = torch.tensor([[*prompt.ids, *own[:-1]]])
        with torch.inference_mode():
            stock = model(ids).logits[0, len(prompt.ids) - 1 :]
        assert len(stock) == len(own) == STOPPING.most or own[-1] in STOPPING.eos
        check_choices(torch.tensor(own), stock, tolerance(stock, dtype))


@HALVES
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "gpt_oss"])
def test_keeping_all_reproduces_the_baseline_up_to_near_ties(name, dtype):
    model = in_half(name, dtype)
    grid, _ = run(
        model, prompts(), cells("snapkv(window=4)", "h2o", "adakv(window=4)", ratios=(1.0,))
    )
    base, *others = outcomes(grid)
    for outcome in others:
        assert outcome.bytes_held == outcome.bytes_full
        for index, prompt in enumerate(prompts()):
            own, full = outcome.answers[index].tokens, base.answers[index].tokens
            ids = torch.tensor([[*prompt.ids, *own[:-1]]])
            with torch.inference_mode():
                stock = model(ids).logits[0, len(prompt.ids) - 1 :]
            check_choices(torch.tensor(own), stock, tolerance(stock, dtype))
            if own == full:
                assert outcome.answers[index].agreement >= 0.9
            assert outcome.answers[index].kl < 0.01


@HALVES
def test_half_precision_runs_under_every_cache_and_keeps_its_type(dtype):
    model = llama().to(dtype)
    grid, _ = run(model, prompts(), cells(*EVERY_CACHE))
    answers(grid)
    full, _ = run(llama(), prompts()[:1], [])
    half, _ = run(model, prompts()[:1], [])
    assert half.baseline.bytes_full * 2 == full.baseline.bytes_full
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
