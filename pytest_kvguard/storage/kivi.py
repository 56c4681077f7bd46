"""KIVI: store keys by channel and values by token, in a few bits each.

Liu et al., 2024, algorithm 1, https://arxiv.org/abs/2402.02750

keys        `group` neighbouring tokens share the scale and zero point of each channel; encoded
            `residual` at a time, as soon as there are so many
values      `group` neighbouring channels of a token share a scale and a zero point; all but the
            latest `residual` tokens are encoded

A token is attended as the model made it before anything is encoded for it, as in the paper.
Differs from the paper: a head smaller than `group` is one group; the defaults are 4 bits and
groups and a residual of 32, for short prompts (the paper: 2 bits, 32 and 128). After eviction the
tokens that are left form the groups, and one that goes while decoding leaves its place empty.
"""

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.parameters import check_count, frozen
from pytest_kvguard.storage.affine import Affine
from pytest_kvguard.storage.base import Storage

BITS = (2, 4, 8)


def kivi(bits: int = 4, group: int = 32, residual: int = 32) -> Storage:
    """Store keys and values in 2, 4 or 8 ``bits``; ``residual``: a multiple of ``group``."""
    if bits not in BITS or isinstance(bits, bool):
        raise InvalidArgument(f"bits must be one of {BITS}, got {bits!r}")
    check_count("group", group)
    if check_count("residual", residual) % group:
        raise InvalidArgument(
            f"residual must be a multiple of group, got residual={residual} and group={group}"
        )
    return Storage(
        keys=Affine(bits, span=group, width=1),
        values=Affine(bits, width=group),
        residual=residual,
        params=frozen(bits=bits, group=group, residual=residual),
    )
