"""Code of other people is called in a way that every supported transformers knows."""

from contextlib import contextmanager
from dataclasses import replace

from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.grid import Cell, Prompt
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.policies.knorm import knorm
from tests.engine.grids import STOPPING
from tests.tiny import llama, tokens


def half(share):
    """Keep a share of the keys of every layer, from the end, as code outside this package might."""

    @contextmanager
    def compressing(model):
        def shorten(module, args, kwargs, output):
            cache = kwargs["cache"] if "cache" in kwargs else kwargs["past_key_values"]
            layer = cache.layers[module.layer_idx]
            keep = int(share * layer.keys.shape[2])
            layer.keys, layer.values = layer.keys[:, :, -keep:], layer.values[:, :, -keep:]

        hooks = [
            layer.self_attn.register_forward_hook(shorten, with_kwargs=True)
            for layer in model.model.layers
        ]
        yield
        for hook in hooks:
            hook.remove()

    return compressing


def test_code_from_outside_compresses_the_cache_it_is_given():
    policy = replace(knorm(), name="theirs", foreign=half)
    prompt = Prompt(tuple(tokens(40)), 0)
    grid = Engine(AttentionHook(llama())).run([prompt], [Cell(policy, 0.5)], STOPPING)
    [cell] = grid.cells.values()
    assert cell.problem is None
    assert 0.4 < float(cell.held[0].max()) <= 0.5
