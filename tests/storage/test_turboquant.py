"""TurboQuant as vLLM defines it, against float64 loops written from its kernels."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies import get_policy
from pytest_kvguard.storage.base import Plain
from pytest_kvguard.storage.turboquant import Levels, Uniform, lloyd_max, signs, turboquant
from pytest_kvguard.storage.vllm_fp8 import ScaledFloat8
from tests.storage.heads import heads

PRESETS = {"k8v4": (8, 4), "4bit_nc": (4, 4), "k3v4_nc": (3, 4), "3bit_nc": (3, 3)}


def solve_lloyd_max(d: int, bits: int) -> list[float]:
    """centroids.py, panel by panel."""
    count, deviation = 2**bits, 1 / math.sqrt(d)
    low, high = -3.5 * deviation, 3.5 * deviation
    levels = [low + (high - low) * (i + 0.5) / count for i in range(count)]

    def density(x: float) -> float:
        return math.exp(-x * x * d / 2)

    def integral(f, a: float, b: float) -> float:
        h = (b - a) / 200
        return h * (0.5 * (f(a) + f(b)) + sum(f(a + i * h) for i in range(1, 200)))

    for _ in range(200):
        middles = [(a + b) / 2 for a, b in pairwise(levels)]
        edges = [3 * low, *middles, 3 * high]
        means = [
            integral(lambda x: x * density(x), a, b) / integral(density, a, b)
            for a, b in pairwise(edges)
        ]
        if max(abs(new - old) for new, old in zip(means, levels, strict=True)) < 1e-10:
            break
        levels = means
    return levels


@pytest.mark.parametrize(("size", "bits"), [(64, 3), (128, 4)])
def test_levels_are_those_that_vllm_solves_for(size, bits):
    own = lloyd_max(size, bits).double()
    torch.testing.assert_close(own, torch.tensor(solve_lloyd_max(size, bits)).double())


@pytest.mark.parametrize("bits", [3, 4])
def test_levels_are_the_means_of_a_normal_distribution_between_their_middles(bits):
    """Lloyd-Max: what makes them optimal, by the normal distribution itself."""
    normal = lloyd_max(64, bits).double().numpy() * 8
    edges = np.concatenate([[-np.inf], (normal[1:] + normal[:-1]) / 2, [np.inf]])
    means = [stats.truncnorm.mean(low, high) for low, high in pairwise(edges)]
    np.testing.assert_allclose(normal, means, atol=0.02)  # 200 rounds and panels


def key_of(x: list[float], bits: int, correct: bool, flips: list[float]) -> list[float]:
    """What a key is read as: `_tq_fused_store_mse`, then `_tq_decode_stage1`, rotated back."""
    size = len(x)
    levels = lloyd_max(size, bits).double().tolist()
    middles = [(a + b) / 2 for a, b in pairwise(levels)]
    turn = [
        [(-1) ** (i & j).bit_count() / math.sqrt(size) for j in range(size)] for i in range(size)
    ]
    norm = math.sqrt(sum(one * one for one in x))
    unit = [one / (norm + 1e-8) * flip for one, flip in zip(x, flips, strict=True)]
    rotated = [sum(unit[i] * turn[i][j] for i in range(size)) for j in range(size)]
    assert min(abs(one - middle) for one in rotated for middle in middles) > 1e-7  # no tie
    read = [levels[sum(one >= middle for middle in middles)] for one in rotated]
    if correct:
        length = math.sqrt(sum(level * level for level in read) + 1e-16)
        read = [level / length for level in read]
    back = [sum(read[j] * turn[j][i] for j in range(size)) for i in range(size)]
    stored = float(np.float16(norm))
    return [stored * one * flip for one, flip in zip(back, flips, strict=True)]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_key_is_its_norm_and_the_nearest_levels_of_its_rotation(bits, correct, flipped):
    keys, codec = 20 * heads(3, 32), Levels(bits, correct, flipped)
    flips = signs(32).tolist() if flipped else [1.0] * 32
    own = codec.decode(codec.encode(keys), torch.float32).reshape(-1, 32)
    for row, x in zip(own, keys.reshape(-1, 32).double().tolist(), strict=True):
        expected = torch.tensor(key_of(x, bits, correct, flips))
        torch.testing.assert_close(row, expected, rtol=0, atol=2e-4)


def test_corrected_keys_have_the_norms_they_had():
    keys = 20 * heads(8, 64)
    norms = {}
    for correct in (False, True):
        codec = Levels(3, correct)
        norms[correct] = codec.decode(codec.encode(keys), torch.float32).norm(dim=-1)
    torch.testing.assert_close(norms[True], keys.norm(dim=-1), rtol=2**-10, atol=0)
    assert (norms[False] / keys.norm(dim=-1) - 1).abs().max() > 0.01


def test_signs_are_those_of_vllms_first_layer():
    """generate_wht_signs(64, seed=42), and both are drawn."""
    drawn = torch.randint(0, 2, (64,), generator=torch.Generator().manual_seed(42))
    assert signs(64).tolist() == (drawn.float() * 2 - 1).tolist()
    assert set(signs(64).tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("bits", [3, 4])
def test_a_value_is_uniform_between_its_smallest_and_largest_channel(bits):
    """`_store_quantized_value`: in float32, halves up, scale and zero rounded afterwards."""
    values, most = 7 * heads(6, 32), 2**bits - 1
    values[0, 0, 0] = torch.arange(32) % (most + 1) * 0.5  # exact
    values[0, 0, 1] = torch.arange(32) % (2 * most + 1) * 0.5  # every other one between two
    values[0, 0, 2] = 0.25  # all alike
    own = Uniform(bits).decode(Uniform(bits).encode(values), torch.float32)
    for row, x in zip(own.reshape(-1, 32), values.reshape(-1, 32).numpy(), strict=True):
        scale = max((x.max() - x.min()) / np.float32(most), np.float32(1e-8))
        codes = [min(max(int((one - x.min()) / scale + np.float32(0.5)), 0), most) for one in x]
        step, zero = np.float32(np.float16(scale)), np.float32(np.float16(x.min()))
        assert row.tolist() == [float(np.float32(code) * step + zero) for code in codes]


def test_a_value_that_hardly_changes_is_its_smallest_channel():
    """`v_scale` is at least 1e-8."""
    packed, scale, low = Uniform(4).encode(torch.linspace(0, 1e-9, 32)[None, None, None])
    assert not any(part.any() for part in (packed, scale, low))


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_lie_in_bytes_as_in_a_slot(bits):
    """Bit i * bits of a little-endian number begins the code of channel i."""
    packed, *_ = Uniform(bits).encode(heads(1, 16)[:1, :1])
    number = int.from_bytes(bytes(packed.flatten().tolist()), "little")
    x = heads(1, 16)[0, 0, 0]
    steps = (x - x.min()) / ((x.max() - x.min()) / (2**bits - 1))
    codes = [number >> i * bits & (2**bits - 1) for i in range(16)]
    assert codes == (steps + 0.5).floor().int().tolist()


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_are_those_of_a_slot(preset, size):
    """`slot_size_aligned` of config.py: codes, a norm unless in 8 bits, scale and zero, even."""
    keys, values = PRESETS[preset]
    packed = size if keys == 8 else math.ceil(size * keys / 8) + 2
    slot = packed + math.ceil(size * values / 8) + 4
    store, tokens = get_policy(f"turboquant_{preset}").store, heads(1, size)[:1, :1]
    own = sum(p.nbytes for codec in (store.keys, store.values) for p in codec.encode(tokens))
    assert own == slot + slot % 2


def test_presets_are_vllms():
    stores = {name: get_policy(f"turboquant_{name}").store for name in PRESETS}
    assert stores["k8v4"].keys == ScaledFloat8(torch.float8_e4m3fn)
    assert stores["4bit_nc"].keys == Levels(4, correct=True)
    assert stores["k3v4_nc"].keys == stores["3bit_nc"].keys == Levels(3, correct=True)
    assert [store.values.bits for store in stores.values()] == [4, 4, 4, 3]
    assert {store.skip for store in stores.values()} == {2}
    assert get_policy("full|turboquant(keys=8, values=4)").store == stores["k8v4"]
    assert get_policy("turboquant(keys=3, signs=True, skip=0)").store.params == {
        "keys": 3, "values": 4, "correct": True, "signs": True, "skip": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "skipped"),
    [(8, [0, 1, 6, 7]), (4, [0, 1, 2, 3]), (5, [0, 1, 3, 4]), (3, [0, 2]), (1, [])],
)
def test_layers_at_either_end_stay_as_they_are(layers, skipped):
    """`get_boundary_skip_layers`: n = min(2, layers // 2) at either end."""
    store = turboquant()
    plain = [i for i in range(layers) if store.of_layer(i, layers).keys == Plain()]
    assert plain == skipped
    assert all(store.of_layer(i, layers) is store for i in range(layers) if i not in skipped)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"keys": 5}, r"keys must be one of \(3, 4, 8\), got 5"),
        ({"values": 8}, r"values must be one of \(3, 4\), got 8"),
        ({"correct": 1}, "correct must be True or False, got 1"),
        ({"keys": 8, "signs": "no"}, "signs must be True or False, got 'no'"),
        ({"skip": -1}, "skip must be a whole number of at least 0, got -1"),
    ],
)
def test_a_bad_value_is_refused_with_what_would_do(asked, message):
    with pytest.raises(InvalidArgument, match=message):
        turboquant(**asked)


@pytest.mark.parametrize("size", [8, 12, 96])
def test_heads_that_cannot_be_rotated_are_refused(size):
    with pytest.raises(InvalidArgument, match=f"heads of {size} channels.*power of two.*keys=8"):
        Levels(4).encode(heads(2, size))
    with pytest.raises(InvalidArgument, match="12 channels do not fill whole bytes with 3 bits"):
        Uniform(3).encode(heads(2, 12))
