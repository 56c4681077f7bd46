"""A prefill that drops tokens between layers must be one in which they are really dropped.

The oracle runs stock decoder layers one after the other in float64 and throws hidden states away.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache

from pytest_kvguard.engine.batch import Batch
from pytest_kvguard.engine.cache.base import Rows
from pytest_kvguard.engine.cache.dense import DenseCache
from pytest_kvguard.engine.cache.group import Group
from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.grid import Cell, Prompt, Stopping
from pytest_kvguard.engine.model import AttentionHook, cache_argument
from pytest_kvguard.engine.own_prefill.layerwise import keep_layerwise
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.errors import InvalidArgument, Unsupported
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import EMPTY
from pytest_kvguard.policies.selectors import top_tokens
from tests.tiny import family, llama, tokens

LAYERS = 6
PROMPT = tokens(60)
ANSWER = tokens(5, seed=3)
STOPPING = Stopping(8, frozenset({5}), (), lambda ids: " ".join(map(str, ids)))
RECENT, SINKS, DISTANCE = 0.2, 4, 1.2


@pytest.fixture(scope="module")
def model():
    return llama(num_hidden_layers=LAYERS).double()


def really_dropped(model, ids, budgets, last_stays):
    """Run the layers on fewer and fewer tokens; also return what the tokens fed after it say.

    budgets: positions each layer keeps. Returns the kept positions of each layer, and the logits
    of the last prompt token, fed again, and of the answer.
    """
    inner, cache = model.model, DynamicCache()
    at = torch.arange(len(ids))
    hidden = inner.embed_tokens(torch.tensor([ids]))
    kept = []
    for number, layer in enumerate(inner.layers):
        rope = inner.rotary_emb(hidden, at[None])
        causal = (at[:, None] < at[None, :]).double() * -1e300
        probe = {}
        hook = layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, out, probe=probe: probe.update(x=kwargs["hidden_states"]),
            with_kwargs=True,
        )
        out = layer(
            hidden,
            attention_mask=causal[None, None],
            position_ids=at[None],
            position_embeddings=rope,
            **cache_argument(layer, cache),
        )
        hook.remove()
        attention = probabilities(layer.self_attn, probe["x"], rope, causal)  # (Hq, t, t)
        rows = [i for i, p in enumerate(at.tolist()) if p >= len(ids) - int(RECENT * len(ids))]
        votes = {p: 0.0 for p in at.tolist()}
        for order, row in enumerate(rows):
            weight = 1 + (DISTANCE - 1) * order / max(1, len(rows) - 1)
            for i, p in enumerate(at.tolist()):
                votes[p] += weight * float(attention[:, row, i].mean()) / len(rows)
        n = budgets[number]
        latest = at.tolist()[-max(1, min(int(RECENT * len(ids)), n // 2)) :]
        first = [p for p in at.tolist() if p < SINKS and p not in latest]
        others = sorted((p for p in votes if p not in {*latest, *first}), key=lambda p: -votes[p])
        stay = sorted((latest + first + others)[:n])
        index = torch.tensor([i for i, p in enumerate(at.tolist()) if p in stay])
        kept.append(stay)
        held = cache.layers[number]
        of_cache = index[:-1] if last_stays else index  # the last token is fed again
        held.keys, held.values = held.keys[:, :, of_cache], held.values[:, :, of_cache]
        hidden, at = out.index_select(1, index), at[index]
    fed = torch.arange(len(ids) - 1, len(ids) + len(ANSWER))
    hidden = inner.embed_tokens(torch.tensor([[ids[-1], *ANSWER]]))
    rope = inner.rotary_emb(hidden, fed[None])
    for number, layer in enumerate(inner.layers):
        past = cache.layers[number].keys.shape[2]
        mask = torch.zeros(len(fed), past + len(fed), dtype=torch.float64)
        mask[:, past:] = (fed[:, None] < fed[None, :]).double() * -1e300
        hidden = layer(
            hidden,
            attention_mask=mask[None, None],
            position_ids=fed[None],
            position_embeddings=rope,
            **cache_argument(layer, cache),
        )
    return kept, model.lm_head(inner.norm(hidden))[0]


def probabilities(attention, hidden, rope, mask):
    """Return the weights one stock attention gives, (Hq, t, t), from its projections alone."""
    size = attention.head_dim
    query = attention.q_proj(hidden).unflatten(-1, (-1, size)).transpose(1, 2)
    key = attention.k_proj(hidden).unflatten(-1, (-1, size)).transpose(1, 2)
    cos, sin = (part[:, None] for part in rope)

    def turned(x):
        half = size // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin

    key = turned(key).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = turned(query) @ key.transpose(-1, -2) / math.sqrt(size) + mask
    return logits.softmax(dim=-1)[0]


def keep(model, policy, ratio, protected=()):
    hook, prompt = AttentionHook(model), Prompt(tuple(PROMPT), context=0, protected=protected)
    with hook.open():
        [full] = prefill(hook, [Wanted(prompt.ids)], Observe())
        return hook, keep_layerwise(hook, prompt, Cell(policy, ratio), full)


def dropped(model, ratio):
    """What each layer keeps, and what the tokens fed after it say."""
    hook, kept = keep(model, get_policy("pyramidinfer"), ratio)
    fed = [PROMPT[-1], *ANSWER]
    with hook.open():
        group = Group.of(Rows([kept]), DenseCache, capacity=len(fed))
        logits = Batch(hook, [group], [kept.length]).feed([fed], last=len(fed))[0]
    return kept, logits


def held_by(kept):
    """For each layer, the positions each head keeps."""
    return [[[at for at in head if at != EMPTY] for head in x.tolist()] for x in kept.positions]


@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.35, 0.15])
@torch.inference_mode()
def test_what_is_hidden_from_later_layers_is_as_good_as_dropped(model, ratio):
    kept, logits = dropped(model, ratio)
    expected, said = really_dropped(model, PROMPT, kept.budgets, last_stays=True)
    for heads, stay in zip(held_by(kept), expected, strict=True):
        assert all(held == stay[:-1] for held in heads)
    torch.testing.assert_close(logits, said, rtol=1e-6, atol=1e-6)


def test_masks_nest_and_fall_from_layer_to_layer(model):
    kept, _ = dropped(model, 0.4)
    sets = [set(heads[0]) for heads in held_by(kept)]
    assert all(later <= earlier for earlier, later in pairwise(sets))
    assert len(sets[0]) > len(sets[2]) > len(sets[-1])
    assert all(set(range(SINKS)) <= each for each in sets)
    assert sum(len(each) + 1 for each in sets) <= 0.4 * len(PROMPT) * LAYERS


def test_hiding_changes_what_later_layers_hold(model):
    """Were it only the cache that shrinks, the values of what is kept would be the full ones."""
    kept, _ = dropped(model, 0.3)
    whole, _ = dropped(model, 1.0)
    for number, heads in enumerate(held_by(kept)):
        values, full = kept.own[number][1], whole.own[number][1]
        same = torch.allclose(values, full[:, heads[0]], atol=1e-9)
        assert same == (number <= 1)  # the first layer sees all, the second is fed by the first


def test_protected_positions_stay_in_every_layer(model):
    _, kept = keep(model, get_policy("pyramidinfer"), 0.15, protected=(7, 20, 33))
    assert all({7, 20, 33} <= set(heads[0]) for heads in held_by(kept))


def prompts(ahead):
    return [Prompt((*PROMPT, *tokens(4, seed=i)), len(PROMPT), ahead) for i in range(3)]


def run(what, *cells):
    hook = AttentionHook(family("llama"))
    grid = Engine(hook).run(what, [Cell(get_policy(spec), r) for spec, r in cells], STOPPING)
    assert [cell.problem for cell in grid.cells.values()] == [None] * len(cells)
    return grid, hook


def test_each_ratio_costs_a_prefill_and_the_count_shows_it():
    cells = [("pyramidinfer", 0.5), ("pyramidinfer", 0.25), ("pyramidinfer_kv", 0.5)]
    grid, _ = run(prompts(ahead=False), *cells)
    assert grid.prefills == 1  # one shared context
    assert [cell.prefills for cell in grid.cells.values()] == [3, 3, 0]  # the question is in it
    _, few = run(prompts(ahead=False), ("pyramidinfer", 1.0))
    _, none = run(prompts(ahead=False), ("snapkv", 1.0))
    assert few.forwards - none.forwards == 3


def test_what_is_compressed_before_the_question_is_prefilled_once_a_cell():
    grid, _ = run(prompts(ahead=True), ("pyramidinfer", 0.5), ("pyramidinfer", 0.25))
    assert [cell.prefills for cell in grid.cells.values()] == [1, 1]
    alone, _ = run(prompts(ahead=True)[2:], ("pyramidinfer", 0.5))
    assert alone.cells[0].answers[0].tokens == grid.cells[0].answers[2].tokens


def test_contexts_do_not_share_what_is_kept():
    two = [Prompt((*context, *PROMPT[:4]), 40, True) for context in (tokens(40), tokens(40, 9))]
    grid, _ = run(two, ("pyramidinfer", 0.3))
    assert grid.cells[0].prefills == 2
    alone, _ = run(two[1:], ("pyramidinfer", 0.3))
    assert alone.cells[0].answers[0].tokens == grid.cells[0].answers[1].tokens


def test_the_answer_is_read_from_what_is_left():
    grid, _ = run(prompts(ahead=False), ("pyramidinfer", 0.2), ("pyramidinfer_kv", 0.2))
    for cell in grid.cells.values():
        assert all(held.mean() <= 0.2 for held in cell.held)
        assert all(held.mean() > 0.15 for held in cell.held)
    said = [[a.tokens for a in cell.answers.values()] for cell in grid.cells.values()]
    assert said[0] != said[1]


def test_models_with_sliding_layers_are_refused():
    with pytest.raises(Unsupported, match="layer 0 has sliding attention"):
        keep(family("gemma3"), get_policy("pyramidinfer"), 0.5)


def test_a_policy_that_revives_what_is_gone_is_told(model):
    policy = replace(get_policy("pyramidinfer"), select=top_tokens, importance=_the_layer_decides)
    with pytest.raises(InvalidArgument, match="kept what an earlier layer dropped"):
        keep(model, policy, 0.5)


def _the_layer_decides(state):
    order = torch.arange(state.length, dtype=torch.float32)
    return (order if state.layer % 2 else -order).expand(state.keys.shape[0], -1)
