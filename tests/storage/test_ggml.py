"""llama.cpp's blocks, against loops written from `quantize_row_*_ref` of ggml-quants.c."""

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies import get_policy
from pytest_kvguard.storage.ggml import TYPES, Half, llamacpp
from pytest_kvguard.storage.rotation import Rotated
from tests.storage.heads import heads

F = np.float32
BITS = {"q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5, "iq4_nl": 4.5}
LEVELS = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
Block = NDArray[np.float32]


def largest(x: Block) -> np.float32:
    """The number of largest size, with its sign; of equals the first."""
    found = F(0)
    for one in x:
        if abs(one) > abs(found):
            found = one
    return found


def symmetric(x: Block, half: int) -> list[float]:
    scale = largest(x) / F(-half)
    inverse = F(1) / scale if scale else F(0)
    codes = [min(2 * half - 1, int(one * inverse + F(half + 0.5))) for one in x]  # C truncates
    return [(code - half) * F(np.float16(scale)) for code in codes]


def asymmetric(x: Block, most: int) -> list[float]:
    scale = (x.max() - x.min()) / F(most)
    inverse = F(1) / scale if scale else F(0)
    codes = [min(most, int((one - x.min()) * inverse + F(0.5))) for one in x]
    return [F(code) * F(np.float16(scale)) + F(np.float16(x.min())) for code in codes]


def q8_0(x: Block) -> list[float]:
    scale = abs(x).max() / F(127)
    inverse = F(1) / scale if scale else F(0)
    steps = [one * inverse for one in x]
    codes = [int(np.sign(s) * np.floor(abs(s) + F(0.5))) for s in steps]  # roundf
    return [F(code) * F(np.float16(scale)) for code in codes]


def iq4_nl(x: Block) -> list[float]:
    top = largest(x)
    if abs(top) < 1e-15:
        return [0.0] * len(x)
    inverse = F(1) / (top / F(LEVELS[0]))
    levels = [min(reversed(LEVELS), key=lambda level, s=s: abs(level - s)) for s in inverse * x]
    along = sum(float(one) ** 2 * level * float(one) for one, level in zip(x, levels, strict=True))
    norm = sum(float(one) ** 2 * level**2 for one, level in zip(x, levels, strict=True))
    return [level * F(np.float16(along / norm)) for level in levels]


LOOPS = {
    "q8_0": q8_0,
    "q5_1": lambda x: asymmetric(x, 31),
    "q5_0": lambda x: symmetric(x, 16),
    "q4_1": lambda x: asymmetric(x, 15),
    "q4_0": lambda x: symmetric(x, 8),
    "iq4_nl": iq4_nl,
}


def corners() -> Tensor:
    """Blocks in which rounding, ties and empty scales show, (1, 1, n, 64)."""
    rows = torch.zeros(10, 64)
    rows[0, 5], rows[0, 9] = -3.0, 3.0  # as large either way: the first says the sign
    rows[1, 5], rows[1, 9] = 3.0, -3.0
    rows[2] = torch.arange(64) - 31.5  # halves
    rows[3, :32] = torch.arange(32) * 4.0  # an exact scale of q8_0, q4_1, ...
    rows[4] = 0.7
    rows[5] = -1e-20
    rows[6] = torch.linspace(-127, 127, 64) / 2
    rows[7, ::7] = 6e4  # near the end of 16-bit floats
    rows[8] = torch.arange(64) % 9 - 4.5  # halves of q8_0 under a scale of 1
    rows[8, [0, 32]] = 127.0
    rows[9, 1:16] = rows[9, 33:48] = -torch.tensor(LEVELS[:-1] + np.diff(LEVELS) / 2)
    rows[9, [0, 32]] = torch.tensor([127.0, -127.0])  # between levels of iq4_nl under 1 and -1
    return rows[None, None]


@pytest.mark.parametrize("tokens", [heads(12, 64), 50 * heads(12, 64), corners()], ids="abc")
@pytest.mark.parametrize("kind", LOOPS)
def test_a_block_is_restored_as_the_reference_restores_it(kind, tokens):
    codec = TYPES[kind]
    restored = codec.decode(codec.encode(tokens), torch.float32)
    rows = tokens.reshape(-1, 32).numpy()
    expected = np.array([LOOPS[kind](row) for row in rows], dtype=np.float32)
    slack = 2.0**-10 if kind == "iq4_nl" else 0  # its sums may round a scale to its neighbour
    np.testing.assert_allclose(restored.reshape(-1, 32).numpy(), expected, rtol=slack, atol=0)


@pytest.mark.parametrize("tokens", [heads(12, 64), corners()], ids="ab")
@pytest.mark.parametrize("kind", [kind for kind in LOOPS if kind != "iq4_nl"])
def test_it_is_restored_as_by_llama_cpps_own_package(kind, tokens):
    quantization = gguf.GGMLQuantizationType[kind.upper()]
    stored = gguf.quants.quantize(tokens.numpy(), quantization)
    parts = TYPES[kind].encode(tokens)
    assert sum(part.nbytes for part in parts) == stored.nbytes
    expected = gguf.quants.dequantize(stored, quantization)
    assert TYPES[kind].decode(parts, torch.float32).numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("kind", LOOPS)
def test_codes_lie_in_bytes_as_in_a_block(kind):
    """The package's block: scale, minimum, fifth bits, codes. Ours are apart, in these bytes."""
    if kind == "iq4_nl":  # cannot be quantized by the package, but read
        codes, scale = TYPES[kind].encode(heads(1, 32))
        block = np.concatenate([scale.numpy().view(np.uint8), codes.numpy()], axis=-1)
        expected = TYPES[kind].decode((codes, scale), torch.float32).numpy()
        read = gguf.quants.dequantize(block, gguf.GGMLQuantizationType.IQ4_NL)
        assert read.tolist() == expected.tolist()
        return
    codes, *rest = TYPES[kind].encode(heads(1, 32))
    fifth, scales = (rest[:1], rest[1:]) if kind.startswith("q5") else ([], rest)
    parts = [*scales, *fifth, codes]
    own = np.concatenate([part.numpy().view(np.uint8) for part in parts], axis=-1)
    quantization = gguf.GGMLQuantizationType[kind.upper()]
    assert own.tolist() == gguf.quants.quantize(heads(1, 32).numpy(), quantization).tolist()


@pytest.mark.parametrize(("kind", "bits"), BITS.items())
def test_bits_a_number_are_those_of_llama_cpps_blocks(kind, bits):
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    tokens = heads(6, 128)
    stored = sum(part.nbytes for part in TYPES[kind].encode(tokens))
    assert stored * 8 / tokens.numel() == bits == size * 8 / block


@pytest.mark.parametrize("size", [64, 128, 192])
@pytest.mark.parametrize("wide", [False, True])
def test_heads_are_rotated_in_pieces_as_llama_cpp_does(size, wide):
    """`ggml_gen_hadamard` and `build_input_k_rot` of llama-kv-cache.cpp, element by element."""
    piece = 64
    while wide and size % (2 * piece) == 0:
        piece *= 2
    signs = [[(-1) ** (i & j).bit_count() for j in range(piece)] for i in range(piece)]
    matrix = np.array(signs) / np.sqrt(piece)
    tokens = heads(5, size)
    cut = tokens.double().numpy().reshape(2, 3, 5, -1, piece)
    expected = (cut @ matrix.T).reshape(tokens.shape)
    plain = Rotated(Plainly(), wide)
    np.testing.assert_allclose(plain.encode(tokens)[0].numpy(), expected, rtol=0, atol=1e-5)
    back = plain.decode(plain.encode(tokens), torch.float32)
    torch.testing.assert_close(back, tokens, rtol=0, atol=1e-5)


class Plainly(Half):
    """Keeps what it is given."""

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return (tokens,)


def test_heads_of_no_multiple_of_64_are_not_rotated():
    tokens = heads(5, 96)
    turned, plain = llamacpp().keys, llamacpp(rotate=False).keys
    for one, other in zip(turned.encode(tokens), plain.encode(tokens), strict=True):
        assert one.equal(other)


def test_rotation_spreads_an_outlier_so_that_less_is_lost():
    tokens = heads(40, 128)
    tokens[..., 3] *= 40
    lost = {}
    for rotate in (False, True):
        codec = llamacpp("q4_0", "q4_0", rotate).values
        lost[rotate] = (codec.decode(codec.encode(tokens), torch.float32) - tokens).norm()
    assert lost[True] < 0.8 * lost[False]


def test_keys_and_values_are_chosen_apart():
    mixed = get_policy("q8_0(values=q4_0)").store
    assert mixed == llamacpp("q8_0", "q4_0")
    assert mixed.params == {"keys": "q8_0", "values": "q4_0", "rotate": True}
    assert (mixed.keys, mixed.values) == (
        Rotated(TYPES["q8_0"], True),
        Rotated(TYPES["q4_0"], False),
    )
    assert get_policy("q5_1(rotate=False)").store == llamacpp("q5_1", "q5_1", rotate=False)
    assert llamacpp("q8_0", "f16").values == Half()
    both = get_policy("full|q4_0").store
    assert both == get_policy("q4_0").store == get_policy("llamacpp(keys=q4_0, values=q4_0)").store


def test_what_does_not_fit_is_refused_with_what_would_do():
    with pytest.raises(InvalidArgument, match=r"80 channels cannot be cut into blocks of 32.*int8"):
        llamacpp().keys.encode(heads(2, 80))
    with pytest.raises(InvalidArgument, match=r"values must be one of f16, q8_0, .*; got 'q2_k'"):
        get_policy("q8_0(values=q2_k)")
    with pytest.raises(InvalidArgument, match="rotate must be True or False, got 1"):
        llamacpp(rotate=1)
