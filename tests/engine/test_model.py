"""The hook into a model: what it refuses, what it counts, and what it leaves as it was."""

import pytest
import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.model import CHANGES_ATTENTION, AttentionHook
from pytest_kvguard.errors import Unsupported
from tests.engine.grids import CONTEXT, STOPPING, answers, cells, prompts, run
from tests.engine.stock import attentions
from tests.tiny import family, llama


def test_a_model_without_attention_is_refused_by_name():
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(Unsupported, match="MambaForCausalLM"):
        run(MambaForCausalLM(config), prompts(), [])


@pytest.mark.parametrize("name", CHANGES_ATTENTION)
def test_attention_that_would_not_be_reproduced_is_refused_by_name(name):
    model = llama()

    def add(module, args, kwargs):
        return args, {**kwargs, name: torch.zeros(1)}

    for module in attentions(model):
        module.register_forward_pre_hook(add, with_kwargs=True)
    with pytest.raises(Unsupported, match=f"layer 0 of LlamaForCausalLM attends with '{name}'"):
        run(model, prompts(), [])


def test_a_model_that_answers_otherwise_when_observed_is_refused():
    """Attention that is called twice in a layer would be recorded once."""
    config = DiffLlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(Unsupported, match="DiffLlamaForCausalLM"):
        run(DiffLlamaForCausalLM(config), prompts(), [])


def test_the_model_is_as_it_was_afterwards():
    model = llama()
    model.train()
    run(model, prompts(), cells("h2o"))
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    model.eval()
    ids = torch.tensor([CONTEXT])
    torch.testing.assert_close(model(ids).logits, llama()(ids).logits)


def test_the_model_is_as_it_was_when_a_run_breaks_off():
    model = llama()
    hook = AttentionHook(model)
    with pytest.raises(RuntimeError, match="stop"), hook.open():
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"
    assert not torch.is_inference_mode_enabled()
    with hook.open(), pytest.raises(Unsupported, match="from outside"):
        model(torch.tensor([CONTEXT]))


FLAGS = {
    SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: cuda.math_sdp_enabled,
}


@pytest.mark.parametrize("before", [list(FLAGS), [SDPBackend.CUDNN_ATTENTION], [SDPBackend.MATH]])
def test_attention_that_plans_for_each_new_shape_is_off_while_the_hook_is_open(before):
    """cuDNN takes 45 ms for every shape it has not seen; who had it on has it on again."""
    hook = AttentionHook(family("llama"))
    with sdpa_kernel(before):
        was = {backend: enabled() for backend, enabled in FLAGS.items()}
        assert was == {backend: backend in before for backend in FLAGS}
        with hook.open():
            assert not cuda.cudnn_sdp_enabled()
            assert cuda.math_sdp_enabled()  # some attention is always there
        assert {backend: enabled() for backend, enabled in FLAGS.items()} == was
        with pytest.raises(RuntimeError, match="stop"), hook.open():
            raise RuntimeError("stop")
        assert {backend: enabled() for backend, enabled in FLAGS.items()} == was


def test_every_pass_of_a_run_goes_without_that_attention():
    seen = []

    class Watching(AttentionHook):
        def call(self, *args, **kwargs):
            seen.append(SDPBackend.CUDNN_ATTENTION in _cur_sdpa_kernel_backends())
            return super().call(*args, **kwargs)

    hook = Watching(family("llama"))
    answers(Engine(hook).run(prompts(), cells("h2o", "snapkv", "pyramidinfer"), STOPPING))
    assert len(seen) >= hook.forwards > 0
    assert not any(seen)


def test_what_goes_through_the_model_is_counted_where_it_is_called():
    model, passes, rows = llama(), [], []
    hook = AttentionHook(model)

    def count(module, args, kwargs):
        ids = kwargs["input_ids"]
        passes.append(ids.numel())
        rows.append(int((kwargs["position_ids"][:, 0] == 0).sum()))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    with hook.uncounted(), hook.open():
        hook.forward(torch.ones(1, 3, dtype=torch.long), torch.arange(3)[None], lambda c: c.query)
    assert (hook.forwards, hook.tokens, hook.prefills) == (0, 0, 0)
    passes.clear()
    rows.clear()
    heard = []
    with hook.open(lambda: heard.append(1)):
        hook.prefill(
            torch.ones(2, 3, dtype=torch.long),
            torch.arange(3)[None].expand(2, -1),
            lambda c: c.query,
        )
        hook.forward(
            torch.ones(2, 1, dtype=torch.long), torch.tensor([[3], [3]]), lambda c: c.query
        )
    handle.remove()
    assert (hook.forwards, hook.tokens, hook.prefills) == (len(passes), sum(passes), sum(rows))
    assert (len(heard), sum(rows)) == (2, 2)
