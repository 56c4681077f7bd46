"""What is held is all the memory there is: tensors counted, for every policy, head by head."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pytest_kvguard.kv.compress import Kept, RaggedKept, importances, keep, keep_masks
from pytest_kvguard.kv.decode import Stopping
from pytest_kvguard.kv.engine import Engine
from pytest_kvguard.kv.evicting import Decoding, EvictingLayer, evicting
from pytest_kvguard.kv.grid import Cell, Prompt
from pytest_kvguard.kv.prefill import About, Observe, prefill
from pytest_kvguard.kv.quantized import quantized
from pytest_kvguard.kv.rope import find_rotation
from pytest_kvguard.kv.rows import GROWTH, GrowingLayer, RaggedLayer, RowLayer, Rows, growing
from pytest_kvguard.kv.seam import Seam
from pytest_kvguard.policies import POLICIES, get_policy
from tests.kv.test_oracle import SMALL
from tests.tiny import family, tokens

RATIO = 0.5
UNITS = tuple((range(start, start + 6),) for start in range(2, 50, 6))
ABOUT = About(units=UNITS, special=(0,), punctuation=(7, 8, 31))
PROMPT = Prompt(tuple(tokens(60)), context=0, about=ABOUT)
TOKEN = 2 * 12 * 4  # bytes of a key and a value: 12 channels each in float32
SHARING = ["adakv(window=4, floor=0.0)", "adapyramidkv(window=4)", "fastgen(threshold=0.8)"]
STORED = "|kivi(bits=4, group=4, residual=4)"
SPECS = [
    *(name + SMALL.get(name, "") for name in POLICIES),
    *SHARING,
    *(spec + after for spec in SHARING for after in ("+h2o@0.5", "+tova@0.3", STORED, "|int8")),
    f"{SHARING[0]}|rerotated",
    f"{SHARING[0]}|fair",
    f"{SHARING[0]}|reuse(layers=2)",
    f"{SHARING[0]}+h2o@0.5{STORED}",
    f"snapkv(window=4){STORED}",
]


def kept_of(spec: str) -> Kept:
    policy, seam = get_policy(spec), Seam(family("llama"))
    with seam.open():
        held = prefill(seam, PROMPT.ids, Observe(policy.window, policy.needs_sums))
        rotation = find_rotation(seam)
    protected = PROMPT.protection(policy, torch.device("cpu"))
    states = held.states(PROMPT.about, protected, rotation.turn)
    masks = keep_masks(policy, importances(policy, states), states, RATIO)
    budgets = [policy.budget(state, RATIO) for state in states]
    return keep(held, masks, budgets, PROMPT.fed, rotation if policy.rerotate else None)


def rows_of(spec: str, kept: Kept) -> Rows:
    """One row with room for one new token."""
    cell = Cell(get_policy(spec), RATIO)
    store, length = cell.policy.store, torch.tensor([len(PROMPT.ids)])
    if cell.decode is None:
        return Rows([kept], quantized(store) if store else growing)
    ratio = torch.tensor([cell.decode_ratio], dtype=torch.float64)
    decoding = Decoding(cell.decode, ratio, length, length, new=(1,))
    return Rows([kept], quantized(store, decoding) if store else evicting(decoding))


def tensors(holder: object) -> Iterator[Tensor]:
    """The keys and values in a layer of rows, wherever they lie."""
    for name in ("heads", "stored", "keys", "values", "parts", "flat", "rest"):
        found = getattr(holder, name, ())
        for part in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(part, Tensor):
                yield part
            else:
                yield from tensors(part)


def memory(layers: dict[int, RowLayer]) -> int:
    """Bytes of the storages behind the tensors, less the room there is for new tokens."""
    own = {t.untyped_storage().data_ptr(): t for layer in layers.values() for t in tensors(layer)}
    return sum(tensor.untyped_storage().nbytes() for tensor in own.values()) - sum(
        room(layer) for layer in layers.values()
    )


def room(layer: RowLayer) -> int:
    """Bytes for new tokens: one slot in heads that evict, GROWTH in those that do not."""
    if isinstance(layer, RaggedLayer):
        return sum(room(head) for head in layer.heads)
    if isinstance(layer, EvictingLayer):
        return layer.positions.shape[1] * TOKEN
    return GROWTH * layer.keys.shape[1] * TOKEN if isinstance(layer, GrowingLayer) else 0


@pytest.mark.parametrize("spec", SHARING)
def test_heads_hold_unequal_numbers_and_together_no_more_than_the_ratio(spec):
    held = kept_of(spec).held + 1  # the last token is fed again
    assert (held[:, 0] != held[:, 1]).any()
    assert held.double().mean() <= RATIO * len(PROMPT.ids)


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_kept_takes_the_bytes_of_what_is_held_and_the_rest_is_freed(spec):
    kept = kept_of(spec)
    own = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in kept.owned.layers
        for head in layer.heads
        for tensor in (head.source.keys, head.source.values)
    }
    assert kept.bytes == kept.owned.bytes == sum(own.values()) == TOKEN * int(kept.held.sum())


@pytest.mark.parametrize("spec", SPECS)
def test_a_row_takes_the_bytes_it_claims(spec):
    kept = kept_of(spec)
    rows = rows_of(spec, kept)
    assert rows.bytes == [memory(rows.layers)]
    if get_policy(spec).store is None:
        assert rows.bytes == [TOKEN * int(kept.held.sum())]  # heads are not padded


def test_reports_count_the_bytes_of_the_tensors():
    cells = [Cell(get_policy(spec), RATIO) for spec in SPECS]
    stopping = Stopping(4, frozenset(), (), lambda ids: "")
    grid = Engine(Seam(family("llama"))).run([PROMPT], cells, stopping)
    assert [outcome.problem for outcome in grid.cells.values()] == [None] * len(SPECS)
    found = {spec: grid.cells[index].bytes_held for index, spec in enumerate(SPECS)}
    assert found == {spec: memory(rows_of(spec, kept_of(spec)).layers) for spec in SPECS}


def test_codes_of_heads_that_evict_are_padded_to_the_fullest_and_counted_so():
    """The one place where heads that hold less take as much as the others."""
    ragged, padded = (kept_of(SHARING[0]), f"{SHARING[0]}+h2o@0.5{STORED}")
    alone = rows_of(SHARING[0] + STORED, ragged).bytes[0]
    assert rows_of(padded, kept_of(padded)).bytes[0] > alone


def test_rows_are_as_long_as_the_longest_of_them_head_by_head():
    kept = [kept_of(spec) for spec in SHARING]
    rows = Rows(kept)
    for index, layer in rows.layers.items():
        longest = torch.stack([row.layers[index].held for row in kept]).amax(dim=0)
        assert isinstance(layer, RaggedLayer)
        assert [head.keys.shape[2] for head in layer.heads] == (longest + GROWTH).tolist()
        held = sum(int(row.layers[index].held.sum()) for row in kept)
        assert int(layer.bytes.sum()) == TOKEN * held


def test_heads_that_hold_equally_many_share_their_tensors():
    even = kept_of("snapkv(window=4)")
    assert not any(isinstance(layer, RaggedKept) for layer in even.layers)
    assert not any(isinstance(layer, RaggedLayer) for layer in Rows([even]).layers.values())
