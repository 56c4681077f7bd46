"""How keys and values are stored: codes against float64 loops written from the formulas."""

import json
import math

import pytest
import torch
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.full import full
from pytest_kvguard.policies.modifiers import MODIFIERS
from pytest_kvguard.storage.affine import Affine
from pytest_kvguard.storage.base import Storage
from pytest_kvguard.storage.bits import pack, unpack
from pytest_kvguard.storage.fp8 import Float8
from pytest_kvguard.storage.kivi import kivi

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = [2, 4, 8]


def heads(tokens: int = 24, size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, 3, tokens, size, generator=generator).to(dtype)


def in_type(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=torch.float64).to(dtype).double().item()


def round_trip(numbers: list[float], bits: int, dtype: torch.dtype) -> list[float]:
    """As KIVI rounds: what a group is restored to."""
    most = 2**bits - 1
    zero = in_type(min(numbers), dtype)
    scale = in_type((max(numbers) - min(numbers)) / most, dtype)
    codes = [min(max(round((x - zero) / scale), 0), most) for x in numbers]
    return [in_type(code * scale + zero, dtype) for code in codes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_keys_are_rounded_by_channel_over_neighbouring_tokens(bits, dtype):
    codec, keys = Affine(bits, span=8, width=1), heads(dtype=dtype)
    expected = torch.empty(keys.shape, dtype=torch.float64)
    for head in range(3):
        for start in range(0, 24, 8):
            for channel in range(16):
                place = (0, head, slice(start, start + 8), channel)
                group = keys[place].double().tolist()
                expected[place] = torch.tensor(round_trip(group, bits, dtype), dtype=torch.float64)
    restored = codec.decode(codec.encode(keys), dtype)
    assert restored.dtype == dtype
    close_to(restored[0], expected[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_values_are_rounded_by_token_over_neighbouring_channels(bits, dtype):
    codec, values = Affine(bits, width=4), heads(dtype=dtype)
    expected = torch.empty(values.shape, dtype=torch.float64)
    for token in range(24):
        for start in range(0, 16, 4):
            place = (1, 2, token, slice(start, start + 4))
            group = values[place].double().tolist()
            expected[place] = torch.tensor(round_trip(group, bits, dtype), dtype=torch.float64)
    close_to(codec.decode(codec.encode(values), dtype)[1, 2], expected[1, 2], dtype)


def close_to(restored: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    off = 4 * torch.finfo(dtype).eps * expected.abs().max()
    torch.testing.assert_close(restored.double(), expected, rtol=0, atol=float(off))


@pytest.mark.parametrize("bits", BITS)
def test_packing_loses_nothing_and_fills_every_bit(bits):
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = unpack(every, bits)
    assert codes.shape == (256, 8 // bits)
    assert pack(codes, bits).equal(every)
    low_first = [(178 >> place) % 2**bits for place in range(0, 8, bits)]
    assert codes[178].tolist() == low_first


def test_a_group_all_alike_is_restored_exactly():
    same = torch.full((1, 1, 4, 8), 0.7)
    for codec in (Affine(2, span=4, width=1), Affine(4), Float8()):
        restored = codec.decode(codec.encode(same), same.dtype)
        torch.testing.assert_close(restored, same, rtol=1e-6, atol=0)
        nothing = codec.decode(codec.encode(0 * same), same.dtype)
        assert nothing.equal(0 * same)


def eight_bit_floats() -> list[float]:
    """E4M3 without infinities: 1 sign, 4 exponent bits of bias 7, 3 mantissa bits."""
    found = []
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) == (15, 7):  # not a number
                continue
            if exponent == 0:
                found.append(mantissa / 8 * 2.0**-6)
            else:
                found.append((1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return [*found, *(-x for x in found)]


def test_the_largest_channel_of_a_token_becomes_the_largest_8_bit_float():
    floats, values = eight_bit_floats(), heads(tokens=6)
    assert max(floats) == 448
    codes, scales = Float8().encode(values)
    largest = codes.view(torch.float8_e4m3fn).float().abs().amax(dim=-1)
    assert (largest == 448).all()
    restored = Float8().decode((codes, scales), values.dtype)
    for token in range(6):
        numbers = values[0, 1, token].double().tolist()
        scale = in_type(max(abs(x) for x in numbers) / 448, torch.float32)
        nearest = [min(floats, key=lambda f, x=x: abs(f - x / scale)) * scale for x in numbers]
        close_to(restored[0, 1, token], torch.tensor(nearest).double(), torch.float32)


@pytest.mark.parametrize(
    ("codec", "bits"),
    [
        (Affine(4, span=32, width=1), 5),  # 4 and 2 * 16 / 32
        (Affine(4, width=32), 5),
        (Affine(2, span=32, width=1), 3),
        (Affine(2, width=32), 3),
        (Affine(8), 8 + 2 * 16 / 64),
        (Float8(), 8 + 16 / 64),
    ],
    ids=str,
)
def test_bits_a_number_are_those_of_codes_scales_and_zero_points(codec, bits):
    tokens = heads(64, 64, torch.float16)
    stored = sum(part.nbytes for part in codec.encode(tokens))
    assert stored * 8 == bits * tokens.numel()


@pytest.mark.parametrize("residual", [1, 4, 8])
def test_what_is_codes_is_what_the_paper_streams(residual):
    """KIVI, algorithm 1: a prompt of any length, then token by token."""
    storage = Storage(Affine(2, span=1, width=1), Affine(2), residual)
    for prompt in range(30):
        key_rest, value_rest = prompt % residual, min(prompt, residual)
        coded = prompt - key_rest, prompt - value_rest
        for count in range(prompt, 40):
            now = torch.tensor(count)
            assert (int(storage.coded_keys(now)), int(storage.coded_values(now))) == coded
            key_rest, value_rest = key_rest + 1, value_rest + 1
            if key_rest == residual:
                coded, key_rest = (coded[0] + residual, coded[1]), 0
            if value_rest > residual:
                coded, value_rest = (coded[0], coded[1] + 1), residual


def test_without_a_residual_everything_is_codes():
    storage = MODIFIERS["int8"]()(full()).store
    count = torch.arange(5)
    assert storage.coded_keys(count).equal(count)
    assert storage.coded_values(count).equal(count)


@pytest.mark.parametrize("name", ["fp8", "int8", "kivi"])
def test_a_storage_alone_is_judged_by_bytes_and_a_policy_with_it_by_positions(name):
    alone, both = MODIFIERS[name]()(full()), MODIFIERS[name]()(get_policy("snapkv"))
    assert (alone.name, alone.saves) == (name, "bytes")
    assert (both.name, both.saves) == (f"snapkv|{name}", "positions")
    assert both.params.items() >= get_policy("snapkv").params.items()
    assert json.loads(json.dumps(dict(alone.params))) == alone.params


def test_kivi_says_how_it_was_asked_for():
    policy = MODIFIERS["kivi"](bits=2, group=8, residual=16)(get_policy("knorm"))
    assert policy.params == {"bits": 2, "group": 8, "residual": 16}
    assert policy.store == Storage(Affine(2, span=8, width=1), Affine(2, width=8), 16)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bits": 3}, r"bits must be one of \(2, 4, 8\), got 3"),
        ({"bits": True}, "got True"),
        ({"group": 0}, "group must be a whole number of at least 1, got 0"),
        ({"residual": 0}, "residual must be a whole number of at least 1, got 0"),
        ({"residual": 48}, "a multiple of group, got residual=48 and group=32"),
    ],
)
def test_a_bad_value_is_refused_with_what_would_do(asked, message):
    with pytest.raises(InvalidArgument, match=message):
        kivi(**asked)


def test_heads_that_cannot_be_cut_are_refused_with_their_size():
    with pytest.raises(InvalidArgument, match="16 channels cannot be cut into groups of 12"):
        Affine(4, width=12).encode(heads())
    with pytest.raises(InvalidArgument, match="5 channels do not fill whole bytes with 4 bits"):
        Affine(4).encode(heads(size=5))
    assert math.isfinite(Affine(4, width=32).encode(heads())[1].sum())  # one group a head


def test_a_cache_is_stored_in_one_way_only():
    with pytest.raises(InvalidArgument, match=r"snapkv\|int8 says already how it is stored"):
        MODIFIERS["fp8"]()(MODIFIERS["int8"]()(get_policy("snapkv")))


def test_keys_that_move_while_decoding_cannot_be_codes():
    moving = get_policy("streaming_llm(positions=cache)")
    with pytest.raises(
        InvalidArgument, match=r"streaming_llm\|int8: keys that are stored as codes"
    ):
        MODIFIERS["int8"]()(moving)
