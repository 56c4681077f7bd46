"""What holds of every format, whatever it stores."""

import pytest
import torch
from torch import Tensor

from pytest_kvguard.policies import get_policy
from pytest_kvguard.storage import FORMATS
from pytest_kvguard.storage.base import Codec
from tests.storage.heads import heads

CODECS = {
    f"{name} {what}": codec
    for name, make in FORMATS.items()
    for store in [make()]
    for what, codec in (("keys", store.keys), ("values", store.values))
}
EVERY = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def round_trip(codec: Codec, tokens: Tensor) -> Tensor:
    return codec.decode(codec.encode(tokens), tokens.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY
def test_what_is_restored_is_near_and_in_the_type_of_what_was_encoded(codec, dtype):
    tokens = heads(32, 64, dtype)
    restored = round_trip(codec, tokens)
    assert (restored.dtype, restored.shape) == (dtype, tokens.shape)
    lost = (restored.float() - tokens.float()).norm() / tokens.float().norm()
    assert 0 < lost < 0.2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY
def test_zeros_are_restored_as_zeros(codec, dtype):
    nothing = torch.zeros(1, 2, 32, 64, dtype=dtype)
    assert round_trip(codec, nothing).equal(nothing)


@EVERY
def test_tokens_that_are_encoded_together_can_be_told_apart(codec):
    tokens = heads(64, 64)
    parts = codec.encode(tokens)
    assert {part.shape[:3] for part in parts} == {(2, 3, 64 // codec.span)}
    alone = codec.encode(tokens[..., 32:, :])
    for part, own in zip(parts, alone, strict=True):
        assert part[:, :, 32 // codec.span :].equal(own)


@EVERY
def test_no_tokens_are_no_bytes(codec):
    parts = codec.encode(heads(32, 64)[:, :, :0])
    assert sum(part.nbytes for part in parts) == 0
    assert codec.decode(parts, torch.float16).shape == (2, 3, 0, 64)


@EVERY
def test_how_tokens_lie_in_memory_changes_nothing(codec):
    tokens = heads(32, 64)
    strided = tokens.transpose(1, 3).contiguous().transpose(1, 3)
    assert not strided.is_contiguous()
    assert round_trip(codec, strided).equal(round_trip(codec, tokens))


@EVERY
def test_it_compiles_as_a_whole(codec):
    tokens = heads(32, 64)
    expected = round_trip(codec, tokens)
    torch._dynamo.reset()
    own = torch.compile(round_trip, fullgraph=True, backend="eager")(codec, tokens)
    torch.testing.assert_close(own, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_it_stands_behind_any_policy_or_alone(name):
    assert get_policy(name).store == FORMATS[name]()
    assert get_policy(f"full|{name}").store == FORMATS[name]()
    assert (get_policy(name).saves, get_policy(f"snapkv|{name}").saves) == ("bytes", "positions")
