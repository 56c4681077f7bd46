"""Tiny random models of every supported family, made on the fly."""

from functools import cache

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 97
WINDOW = 8  # of sliding layers

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large enough for attention to choose
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


def llama(**changes: object) -> PreTrainedModel:
    return seeded(LlamaForCausalLM, LlamaConfig(**{**GROUPED, **changes}))


FAMILIES = {
    "llama": llama,
    "mistral": lambda: seeded(MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=None)),
    "qwen2": lambda: seeded(Qwen2ForCausalLM, Qwen2Config(**GROUPED)),
    "qwen3": lambda: seeded(Qwen3ForCausalLM, Qwen3Config(**GROUPED, head_dim=16)),
    "phi3": lambda: seeded(Phi3ForCausalLM, Phi3Config(**GROUPED, sliding_window=None)),
    "gpt_neox": lambda: seeded(GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES)),
    "gemma3": lambda: seeded(
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **GROUPED,
            head_dim=16,
            query_pre_attn_scalar=9,  # a scaling that is not head_dim ** -0.5
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        ),
    ),
    "gemma2": lambda: seeded(  # a soft cap on attention logits, which only "eager" knows
        Gemma2ForCausalLM,
        Gemma2Config(
            **{**GROUPED, "num_hidden_layers": 4},
            head_dim=16,
            query_pre_attn_scalar=9,
            attn_logit_softcapping=2.0,  # low enough to bend these logits
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 2,
            attn_implementation="eager",
        ),
    ),
    "gpt_oss": lambda: seeded(  # attention sinks, which only "eager" knows
        GptOssForCausalLM,
        GptOssConfig(
            **{**GROUPED, "initializer_range": 0.2},  # with more, experts blow up what bf16 rounds
            head_dim=16,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 8,
                "truncate": False,
            },
            num_local_experts=2,
            num_experts_per_tok=2,  # rounding changes no token's choice of experts
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            attn_implementation="eager",
        ),
    ),
}

WIDE = "llama_wide"
"""Of heads as wide as formats ask for that encode blocks of channels."""


def seeded(cls: type, config: object) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(config).eval()


@cache
def family(name: str) -> PreTrainedModel:
    return llama(head_dim=64) if name == WIDE else FAMILIES[name]()


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()
