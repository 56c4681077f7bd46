"""Heads that share a layer's budget: what they hold, and the memory that takes."""

import pytest
import torch

from pytest_kvguard.kv.compress import Kept, importances, keep, keep_masks
from pytest_kvguard.kv.grid import Prompt
from pytest_kvguard.kv.prefill import About, Observe, prefill
from pytest_kvguard.kv.rows import Rows
from pytest_kvguard.kv.seam import Seam
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import EMPTY
from tests.tiny import family, tokens

RATIO = 0.5
PROMPT = Prompt(tuple(tokens(60)), context=0, about=About(special=(0,), punctuation=(7, 8, 31)))
TOKEN = 2 * 12 * 4  # bytes of a key and a value: 12 channels each in float32
SHARING = ["adakv(window=4, floor=0.0)", "adapyramidkv(window=4)", "fastgen(threshold=0.8)"]


def kept_of(spec: str) -> Kept:
    policy, seam = get_policy(spec), Seam(family("llama"))
    with seam.open():
        held = prefill(seam, PROMPT.ids, Observe(policy.window, policy.needs_sums))
    states = held.states(PROMPT.about, PROMPT.protection(policy, torch.device("cpu")))
    masks = keep_masks(policy, importances(policy, states), states, RATIO)
    return keep(held, masks, [policy.budget(state, RATIO) for state in states], PROMPT.fed)


@pytest.mark.parametrize("spec", SHARING)
def test_heads_hold_unequal_numbers_and_together_no_more_than_the_ratio(spec):
    held = kept_of(spec).held + 1  # the last token is fed again
    assert (held[:, 0] != held[:, 1]).any()
    assert held.double().mean() <= RATIO * len(PROMPT.ids)


@pytest.mark.parametrize("spec", SHARING)
def test_the_bytes_claimed_are_those_of_what_is_held(spec):
    kept = kept_of(spec)
    places = [position for layer in kept.layers for position in layer.positions.flatten().tolist()]
    assert kept.bytes == TOKEN * sum(position != EMPTY for position in places)


@pytest.mark.parametrize("spec", ["snapkv(window=4)", *SHARING])
def test_the_tensors_are_as_long_as_the_fullest_head_and_the_rest_is_freed(spec):
    """Ragged heads are padded: a layer takes the memory of its fullest head for every head."""
    for layer in kept_of(spec).layers:
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no view of the full cache
        fullest, heads = int(layer.held.max()), len(layer.held)
        assert layer.keys.nbytes + layer.values.nbytes == TOKEN * fullest * heads
        if spec.startswith("snapkv"):
            assert layer.bytes == TOKEN * fullest * heads  # nothing is padded


def test_rows_take_the_memory_of_the_fullest_head_among_them():
    kept = [kept_of(spec) for spec in SHARING]
    rows = Rows(kept)
    for index, layer in rows.layers.items():
        fullest = max(int(row.layers[index].held.max()) for row in kept)
        assert layer.keys.nbytes * 2 == TOKEN * fullest * 2 * len(kept)
