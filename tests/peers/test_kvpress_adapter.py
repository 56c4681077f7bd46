"""Presses of kvpress, run through us: what is held and said must be what kvpress itself makes."""

import pytest
import torch
from transformers import DynamicCache

from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.grid import Cell, Prompt, Stopping
from pytest_kvguard.engine.model import AttentionHook, cache_argument
from pytest_kvguard.engine.own_prefill.third_party import keep_third_party
from pytest_kvguard.engine.prefill import Observe, Wanted, prefill
from pytest_kvguard.errors import InvalidArgument, Refused, Unavailable, Unsupported
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.kvpress import kvpress_policy
from tests.tiny import GROUPED, family, llama, tokens

kvpress = pytest.importorskip(
    "kvpress", reason="kvpress needs transformers<5.3: `make peers` runs these where it is"
)

PROMPT = tokens(60)
STOPPING = Stopping(10, frozenset(), (), lambda ids: " ".join(map(str, ids)))

PRESSES = {
    "SnapKVPress(window_size=8)": lambda: kvpress.SnapKVPress(window_size=8),
    "KnormPress": lambda: kvpress.KnormPress(),
    "ExpectedAttentionPress": lambda: kvpress.ExpectedAttentionPress(),
    "StreamingLLMPress": lambda: kvpress.StreamingLLMPress(),
    "TOVAPress": lambda: kvpress.TOVAPress(),
    "KeyDiffPress": lambda: kvpress.KeyDiffPress(),
    "PyramidKVPress(window_size=4)": lambda: kvpress.PyramidKVPress(window_size=4),
    "CriticalKVPress(press=KnormPress)": lambda: kvpress.CriticalKVPress(kvpress.KnormPress()),
}


CHUNKS = "ChunkKVPress(press=KnormPress, chunk_length=7)"


@pytest.fixture
def model():
    """A model of its own for each test: presses leave things on models."""
    return llama(num_hidden_layers=4)


def theirs(model, make, ratio, ids, fed):
    """Prefill as kvpress's pipeline does; return the cache and the answer to what is fed after.

    The pipeline's greedy loop is written out, for caches whose layers differ in length.
    """
    press, cache = make(), DynamicCache()
    press.compression_ratio = 1 - ratio
    with torch.inference_mode():
        with press(model):
            model.model(input_ids=torch.tensor([ids]), **cache_argument(model.model, cache))
        if len({layer.keys.shape[2] for layer in cache.layers}) > 1:
            return cache, None
        said, feed, at = [], list(fed), len(ids)
        for _ in range(STOPPING.most):
            positions = torch.arange(at, at + len(feed))[None]
            given = cache_argument(model, cache)
            out = model(torch.tensor([feed]), position_ids=positions, **given)
            at, feed = at + len(feed), [int(out.logits[0, -1].argmax())]
            said += feed
    return cache, said


def ours(model, spec, ratio, prompt):
    """What is kept, and how many prefills that took beside the one that others share."""
    hook = AttentionHook(model)
    with hook.open():
        [full] = prefill(hook, [Wanted(prompt.ids[: prompt.compressed])], Observe())
        kept = keep_third_party(hook, prompt, Cell(get_policy(spec), ratio), full)
    return kept, hook.prefills - 1


@pytest.mark.parametrize("ahead", [False, True], ids=["prompt", "context"])
@pytest.mark.parametrize("spec", PRESSES)
def test_what_is_held_is_what_kvpress_holds_and_so_is_the_answer(model, spec, ahead):
    prompt = Prompt((*PROMPT, *tokens(3, 5)), len(PROMPT), ahead)
    kept, prefills = ours(model, f"kvpress:{spec}", 0.5, prompt)
    n = kept.budgets[0] - (prompt.compressed - prompt.fed) - (prefills - 1)
    ids = prompt.ids[: prompt.fed]
    cache, said = theirs(model, PRESSES[spec], (n + 0.5) / len(ids), ids, prompt.tail)
    for (keys, _), positions, held in zip(kept.own, kept.positions, cache.layers, strict=True):
        count = keys.shape[1]
        for head in range(2):
            expected = {bytes(key.numpy().tobytes()) for key in held.keys[0, head, :]}
            found = {bytes(key.numpy().tobytes()) for key in keys[head]}
            assert found <= expected  # theirs has gone on to hold the answer
            assert len(found) == count
        assert positions[:, :count].diff().min() > 0
    grid = Engine(AttentionHook(model)).run(
        [prompt], [Cell(get_policy(f"kvpress:{spec}"), 0.5)], STOPPING
    )
    assert grid.cells[0].problem is None
    assert grid.cells[0].held[0].mean() <= 0.5
    if said is not None:
        assert grid.cells[0].answers[0].tokens == said


@pytest.mark.parametrize("ratio", [1.0, 0.77, 0.5, 0.31, 0.2, 0.1])
@pytest.mark.parametrize("spec", [*PRESSES, CHUNKS, "RandomPress"])
def test_never_more_is_held_than_the_ratio_allows(model, spec, ratio):
    prompt = Prompt(tuple(PROMPT), 0)
    if "Chunk" in spec and ratio == 0.1:
        return  # not even one fits
    kept, prefills = ours(model, f"kvpress:{spec}", ratio, prompt)
    held = (kept.held.double().mean() + 1) / len(PROMPT)
    assert held <= ratio
    if ratio == 1.0:
        assert held == 1
    if "Chunk" not in spec:
        assert held > ratio - 2 / len(PROMPT)
        assert prefills <= 2


def test_what_exceeds_the_ratio_is_asked_for_less_and_the_prefills_are_counted(model):
    ahead = Prompt((*PROMPT, 5), len(PROMPT), ahead=True)
    assert ours(model, "kvpress:PyramidKVPress(window_size=4)", 0.5, ahead)[1] == 2


def test_what_exceeds_the_ratio_whatever_it_is_asked_is_refused(model):
    with pytest.raises(Refused, match="holds more than 5 of 59 positions whatever it is asked"):
        ours(model, f"kvpress:{CHUNKS}", 0.1, Prompt(tuple(PROMPT), 0))


def test_positions_are_where_the_keys_were(model):
    kept, _ = ours(model, "kvpress:StreamingLLMPress(n_sink=2)", 0.25, Prompt(tuple(PROMPT), 0))
    for positions in kept.positions:
        assert positions.tolist() == [[0, 1, *range(47, 59)]] * 2


def contents(model):
    """What hangs on a model, but for the None that kvpress writes whenever attention is asked."""
    assert all(getattr(m, "masked_key_indices", None) is None for m in model.modules())
    return [
        (name, vars(m).keys() - {"masked_key_indices"}, set(m._modules), len(m._forward_hooks))
        for name, m in model.named_modules()
    ]


def test_the_model_is_as_it_was(model):
    before = contents(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    attention = model.config._attn_implementation
    state = torch.get_rng_state()
    Engine(AttentionHook(model)).run(
        [Prompt(tuple(PROMPT), 0)],
        [Cell(get_policy(f"kvpress:{spec}"), 0.5) for spec in ("RandomPress", "SnapKVPress")],
        STOPPING,
    )
    assert contents(model) == before
    assert model.config._attn_implementation == attention
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_random_selections_are_the_same_every_time(model):
    first, again = (
        ours(model, "kvpress:RandomPress", 0.5, Prompt(tuple(PROMPT), 0))[0] for _ in range(2)
    )
    assert torch.equal(first.positions, again.positions)


def test_attention_that_was_wrapped_on_import_is_ours_again(model):
    """Importing kvpress wraps every attention function there is, ours too if it is registered."""
    from kvpress.attention_patch import patch_attention_functions
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    cells = [Cell(get_policy("snapkv(window=4)"), 0.5)]
    before = Engine(AttentionHook(model)).run([Prompt(tuple(PROMPT), 0)], cells, STOPPING)
    saved = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    try:
        patch_attention_functions()
        after = Engine(AttentionHook(model)).run([Prompt(tuple(PROMPT), 0)], cells, STOPPING)
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping = saved
    assert after.cells[0].answers[0].tokens == before.cells[0].answers[0].tokens


def test_keys_move_to_cache_positions_by_our_modifier(model):
    cells = [Cell(get_policy(f"kvpress:KnormPress{end}"), 0.4) for end in ("", "|rerotated")]
    cells += [Cell(get_policy(f"knorm{end}"), 0.4) for end in ("", "|rerotated")]
    grid = Engine(AttentionHook(model)).run([Prompt(tuple(PROMPT), 0)], cells, STOPPING)
    assert [outcome.problem for outcome in grid.cells.values()] == [None] * 4
    plain, moved = (grid.cells[i].answers[0].kl for i in (0, 1))
    assert plain != moved


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("AdaKVPress(press=KnormPress)", Unsupported, "masks positions and frees none"),
        ("KeyRerotationPress(press=KnormPress)", Unsupported, "moves, merges or changes keys"),
        ("ObservedAttentionPress", Unsupported, 'attn_implementation="eager"'),
        ("SnapKVPress", Unsupported, "window size"),
        ("QFilterPress", (Unavailable, Unsupported), "QFilterPress"),
    ],
)
def test_what_cannot_be_measured_says_why(model, monkeypatch, spec, error, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=said):
        ours(model, f"kvpress:{spec}", 0.5, Prompt(tuple(PROMPT), 0))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("DecodingPress(base_press=KnormPress)", Refused, "no compression_ratio that can be set"),
        ("ThinKPress", Refused, "no compression_ratio that can be set"),
        ("ChunkKVPress", InvalidArgument, "cannot be made: TypeError.*takes another class by name"),
        ("SnapKVPress(compression_ratio=0.5)", InvalidArgument, "set by the keep ratio"),
        ("SnapKVPress|whitelist(first=2)", InvalidArgument, "selects by code of its own"),
        ("SnapKVPress|reuse", InvalidArgument, "selects by code of its own"),
    ],
)
def test_what_no_keep_ratio_can_be_asked_of_is_refused_when_made(spec, error, said):
    with pytest.raises(error, match=said):
        get_policy(f"kvpress:{spec}")


def test_a_class_kvpress_lacks_is_named():
    with pytest.raises(LookupError, match="did you mean 'SnapKVPress'"):
        get_policy("kvpress:SnapKVpress")


def test_protected_parts_are_refused(model):
    with pytest.raises(Refused, match="does not honour protected parts"):
        ours(model, "kvpress:KnormPress", 0.5, Prompt(tuple(PROMPT), 0, protected=(3,)))


def test_sliding_layers_are_refused():
    with pytest.raises(Unsupported, match="sliding layers"):
        ours(family("gemma3"), "kvpress:KnormPress", 0.5, Prompt(tuple(PROMPT), 0))


def test_an_object_of_kvpress_makes_a_policy_and_is_not_changed(model):
    press = kvpress.KnormPress(compression_ratio=0.9)
    grid = Engine(AttentionHook(model)).run(
        [Prompt((*PROMPT, i), len(PROMPT), ahead=True) for i in (5, 6)],
        [Cell(kvpress_policy(press), ratio) for ratio in (0.5, 0.3)],
        STOPPING,
    )
    assert press == kvpress.KnormPress(compression_ratio=0.9)
    assert [cell.problem for cell in grid.cells.values()] == [None, None]
    assert [cell.prefills for cell in grid.cells.values()] == [1, 1]  # one context
    assert GROUPED["num_key_value_heads"] * 4 == grid.cells[0].held[0].numel()
