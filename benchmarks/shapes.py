"""Randomly initialised models of named shapes: nothing is downloaded, and speed is what it is."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SHAPES = {
    "llama-8b": {  # Llama 3.1 8B
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-1b": {  # Llama 3.2 1B
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def model_of(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Make a Llama of a named shape with random weights, the same each time; no answer ends."""
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=131072,
        rope_theta=500000.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def read_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decoding step reads: all but the table of embeddings.

    Where that is the output layer too, it is read after all.
    """
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    return parameters - (0 if tied else table.nbytes)
