"""Formats of small floats, against tables of every number there is."""

import math
from bisect import bisect_left

import numpy as np
import pytest
import torch

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies import get_policy
from pytest_kvguard.storage.fp4 import MXFP4, NVFP4, mxfp4, nvfp4
from pytest_kvguard.storage.vllm_fp8 import ScaledFloat8, fp8_e4m3, fp8_e5m2
from tests.storage.heads import heads

KINDS = {torch.float8_e4m3fn: (4, 3, 7), torch.float8_e5m2: (5, 2, 15)}
"""Bits of the exponent and of the mantissa, and the bias."""


def floats(exponents: int, mantissas: int, bias: int, most: float) -> list[float]:
    """Every number of a format that is not negative, ascending: the code is its index."""
    found = []
    for code in range(2 ** (exponents + mantissas)):
        exponent, mantissa = divmod(code, 2**mantissas)
        part = mantissa / 2**mantissas
        exact = part * 2.0 ** (1 - bias) if exponent == 0 else (1 + part) * 2.0 ** (exponent - bias)
        if exact <= most:
            found.append(exact)
    return found


E2M1 = floats(2, 1, 1, most=6)
E4M3 = floats(4, 3, 7, most=448)


def nearest(x: float, known: list[float]) -> float:
    """The nearest number, of two the one with an even code, the last beyond the end."""
    size = abs(x)
    at = bisect_left(known, size)
    if at == len(known):
        return math.copysign(known[-1], x)
    low = max(at - 1, 0)
    above, below = known[at] - size, size - known[low]
    up = above < below or (above == below and at % 2 == 0)
    return math.copysign(known[at] if up else known[low], x)


def test_the_tables_are_those_of_the_papers():
    assert E2M1 == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (E4M3[-1], E4M3[1]) == (448, 2.0**-9)
    assert floats(5, 2, 15, most=57344)[-1] == 57344


@pytest.mark.parametrize("scale", [1.0, 0.02, 3.0])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_8_bit_floats_are_the_nearest_under_one_scale_and_saturate(kind, scale):
    """vLLM: __nv_cvt_float_to_fp8(x / scale, __NV_SATFINITE, kind), read as code * scale."""
    known = floats(*KINDS[kind], most=torch.finfo(kind).max)
    tokens = heads(20, 16) * torch.logspace(-6, 7, 20)[:, None]  # from too small to too large
    tokens[0, 0, 0, :8] = torch.tensor([17.0, 19.0, 21.0, -17.0, 0.0, -0.0, 1e9, -1e9])  # ties
    codec = ScaledFloat8(kind, scale)
    (codes,) = codec.encode(tokens)
    step = np.float32(scale)
    expected = [nearest(float(x / step), known) for x in tokens.numpy().flat]
    assert codes.view(kind).double().flatten().tolist() == expected
    restored = (codes.view(kind).float().numpy() * step).flatten().tolist()
    assert codec.decode((codes,), torch.float32).flatten().tolist() == restored
    assert codes.nbytes == tokens.numel()


def test_without_scales_large_keys_are_cut_off_and_with_them_they_are_not():
    keys = 1000 * heads(4, 16)
    far = fp8_e4m3().keys
    assert far.decode(far.encode(keys), torch.float32).abs().max() == 448
    near = fp8_e4m3(k_scale=10.0).keys
    torch.testing.assert_close(
        near.decode(near.encode(keys), torch.float32), keys, rtol=0.07, atol=9
    )


def test_keys_and_values_have_scales_of_their_own():
    store = get_policy("fp8_e5m2(k_scale=0.5, v_scale=2)").store
    assert store.keys == ScaledFloat8(torch.float8_e5m2, 0.5)
    assert store.values == ScaledFloat8(torch.float8_e5m2, 2.0)
    assert store.params == {"k_scale": 0.5, "v_scale": 2.0}
    assert fp8_e4m3().keys == ScaledFloat8(torch.float8_e4m3fn, 1.0)
    store = get_policy("nvfp4(k_scale=0.5, v_scale=2)").store
    assert (store.keys, store.values) == (NVFP4(0.5), NVFP4(2.0))
    assert store.params == {"k_scale": 0.5, "v_scale": 2.0}


def corners() -> torch.Tensor:
    rows = torch.zeros(8, 64)
    rows[0, :7] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # between two each
    rows[0, 7:14], rows[0, 14] = -rows[0, :7], 6.0
    rows[1] = torch.linspace(-7.9, 7.9, 64)  # 7.9 is beyond 6 and rounds no power up
    rows[2] = 1e-30
    rows[3] = torch.linspace(-1e30, 1e30, 64)
    rows[4, :16], rows[4, 16] = 1e-4, 400.0
    rows[5] = 2.0 ** torch.arange(-32, 32)
    return rows[None, None]


@pytest.mark.parametrize("tokens", [heads(12, 64), 300 * heads(12, 64), corners()], ids="abc")
def test_mxfp4_is_the_nearest_under_a_power_of_two(tokens):
    """OCP MX 1.0, 6.3: X = 2^(floor(log2(max)) - 2), then each element, saturated."""
    codes, powers = MXFP4().encode(tokens)
    restored = MXFP4().decode((codes, powers), torch.float32).reshape(-1, 32).tolist()
    rows = tokens.reshape(-1, 32).tolist()
    for row, own, power in zip(rows, restored, powers.flatten().tolist(), strict=True):
        most = max(abs(x) for x in row)
        exponent = math.floor(math.log2(most)) - 2 if most else power - 127
        exponent = max(exponent, -127)
        assert power - 127 == exponent
        assert own == [nearest(x / 2.0**exponent, E2M1) * 2.0**exponent for x in row]


@pytest.mark.parametrize("scale", [1.0, 0.03])
@pytest.mark.parametrize("tokens", [heads(12, 64), 30 * heads(12, 64), corners()], ids="abc")
def test_nvfp4_is_the_nearest_under_an_8_bit_float_and_a_scale_of_the_tensor(tokens, scale):
    """Block scale E4M3(max / 6 / scale), then each element over both, zeros where that is 0."""
    codec, whole = NVFP4(scale), np.float32(scale)
    codes, steps = codec.encode(tokens)
    restored = codec.decode((codes, steps), torch.float32).reshape(-1, 16).tolist()
    rows = tokens.reshape(-1, 16).numpy()
    for row, own, code in zip(rows, restored, steps.flatten().tolist(), strict=True):
        step = nearest(float(abs(row).max() / np.float32(6) / whole), E4M3)
        assert E4M3[code] == step
        width = np.float32(step) * whole
        expected = [nearest(float(x / width), E2M1) * width if width else 0.0 for x in row]
        assert own == [float(np.float32(x)) for x in expected]
    empty = (steps == 0).repeat_interleave(8, dim=-1)  # nothing but zeros of either sign
    assert set(codes[empty].tolist()) <= {0x00, 0x08, 0x80, 0x88}


def test_codes_lie_in_nibbles_the_first_channel_lowest():
    tokens = torch.zeros(1, 1, 1, 32)
    tokens[..., :6] = torch.tensor([6.0, -0.5, 4.0, -3.0, -0.0, 0.0])
    codes, powers = MXFP4().encode(tokens)
    assert codes[0, 0, 0, :3].tolist() == [7 | 9 << 4, 6 | 13 << 4, 8]
    assert powers.flatten().tolist() == [127]


@pytest.mark.parametrize(("storage", "bits"), [(mxfp4(), 4 + 8 / 32), (nvfp4(), 4 + 8 / 16)])
def test_bits_a_number_are_those_of_codes_and_block_scales(storage, bits):
    tokens = heads(6, 128)
    for codec in (storage.keys, storage.values):
        assert sum(part.nbytes for part in codec.encode(tokens)) * 8 == bits * tokens.numel()


def test_what_does_not_fit_is_refused_with_what_would_do():
    with pytest.raises(InvalidArgument, match=r"48 channels cannot be cut into blocks of 32.*int8"):
        MXFP4().encode(heads(2, 48))
    assert NVFP4().encode(heads(2, 48))[1].shape == (2, 3, 2, 3)
    with pytest.raises(InvalidArgument, match="24 channels cannot be cut into blocks of 16"):
        NVFP4().encode(heads(2, 24))
    for factory in (nvfp4, fp8_e4m3, fp8_e5m2):
        with pytest.raises(InvalidArgument, match="v_scale must be a finite number above 0, got 0"):
            factory(v_scale=0)
