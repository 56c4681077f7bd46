"""Memory: what is freed is kept, work is split to fit, and what does not fit is halved."""

import platform
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_kvguard.engine.memory import ON_CPU, chunks, halving, peak_on, room_on

COUNT = """
import resource, torch
from pytest_kvguard.engine.memory import keep_freed_memory

keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):  # as in a layer, whose results exist side by side
    results = [torch.ones(2**22, dtype=torch.uint8) for _ in range(4)]
    del results
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep memory anyway")
def test_what_is_freed_is_not_fetched_page_by_page_again():
    resource = pytest.importorskip("resource")
    faults = int(subprocess.check_output([sys.executable, "-c", COUNT]))
    assert faults < 2 * 4 * 2**22 / resource.getpagesize()  # not twice what exists at a time


SIZES = st.lists(st.integers(0, 20), max_size=20)


@given(SIZES, st.integers(0, 40))
def test_chunks_are_as_large_as_fits_and_lose_nothing(sizes, most):
    found = [list(chunk) for chunk in chunks(sizes, lambda size: size, most)]
    assert [size for chunk in found for size in chunk] == sizes
    assert all(sum(chunk) <= most or len(chunk) == 1 for chunk in found)
    for chunk, after in pairwise(found):
        assert sum(chunk) + after[0] > most


def test_chunks_ask_for_an_item_no_earlier_than_they_must():
    asked = []
    found = chunks((asked.append(item) or item for item in range(9)), lambda _: 1, 3)
    assert asked == []
    assert list(next(found)) == [0, 1, 2]
    assert asked == [0, 1, 2, 3]  # the fourth did not fit


@given(st.integers(1, 30), st.integers(1, 30))
def test_halving_works_on_each_item_once_and_in_order(count, most):
    done: list[int] = []

    def work(items):
        if len(items) > most:
            raise torch.OutOfMemoryError("too many")
        done.extend(items)

    halving(range(count), work)
    assert done == list(range(count))


def test_what_does_not_fit_alone_is_said_and_the_items_before_it_are_done():
    done = []

    def work(items):
        if 2 in items:
            raise torch.OutOfMemoryError("two")
        done.extend(items)

    with pytest.raises(torch.OutOfMemoryError, match="two"):
        halving(range(4), work)
    assert done == [0, 1]


def test_other_faults_are_not_answered_by_halving():
    calls = []

    def work(items):
        calls.append(items)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        halving(range(4), work)
    assert len(calls) == 1


def test_a_cpu_has_a_fixed_room_and_no_peak():
    device = torch.device("cpu")
    assert room_on(device) == ON_CPU
    assert peak_on(device) is None
