"""Rows that are joined go on as if they were alone."""

import pytest
import torch

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.kv.compress import keep_all
from pytest_kvguard.kv.prefill import Observe, prefill
from pytest_kvguard.kv.rows import GROWTH, OneWay, Rows
from pytest_kvguard.kv.seam import Seam
from tests.tiny import family, tokens

LENGTHS = (10, 10 + 2 * GROWTH)  # so far apart that joining must pad
FED = [[7, 8, 9], [11], [12]]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_joined_rows_see_what_they_saw_alone(name, order):
    seam = Seam(family(name))
    with seam.open():
        held = prefill(seam, tokens(max(LENGTHS) + 1), Observe())
        alone = [Rows([keep_all(held, LENGTHS[i])]) for i in order]
        expected = [[rows.feed(seam, [new], last=1) for new in FED] for rows in alone]
        first, second = (Rows([keep_all(held, LENGTHS[i])]) for i in order)
        first.feed(seam, [FED[0]], last=1)
        second.feed(seam, [FED[0]], last=1)
        first.join([second])
        found = [first.feed(seam, [new] * 2, last=1) for new in FED[1:]]
    assert len(first) == 2
    for step, both in enumerate(found, start=1):
        for row in (0, 1):
            torch.testing.assert_close(both[row], expected[row][step][0], rtol=1e-4, atol=1e-4)


def test_rows_that_evict_can_neither_be_rewound_nor_joined():
    for forbidden in (OneWay().forget, OneWay().join):
        with pytest.raises(InvalidArgument, match="evict or encode"):
            forbidden([])
