import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kvguard import values
from pytest_kvguard.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1048576", 2**20),
        ("4GiB", 4 * 2**30),
        ("4gib", 4 * 2**30),
        ("4 GiB", 4 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5GB", 1_500_000_000),
        ("2048KiB", 2**21),
        ("2000kB", 2_000_000),
        ("2e6", 2_000_000),
        ("2000000B", 2_000_000),
        ("1TB", 10**12),
        ("1TiB", 2**40),
    ],
)
def test_a_size_is_read_with_its_unit(text, expected):
    assert values.memory_size(text) == expected


def test_a_size_is_as_accelerate_reads_it():
    from accelerate.utils import convert_file_size_to_int

    for unit in ("KB", "MB", "GB", "KiB", "MiB", "GiB"):
        assert values.memory_size(f"2000{unit}") == convert_file_size_to_int(f"2000{unit}")


def test_the_least_memory_is_the_limit_itself():
    assert values.memory_size(str(values.LEAST_MEMORY)) == values.LEAST_MEMORY
    with pytest.raises(InvalidArgument, match=r"at least 1MiB \(1048576 bytes\), got '1048575'"):
        values.memory_size(str(values.LEAST_MEMORY - 1))


READERS = {
    "keep_ratio": (values.keep_ratio, lambda value: 0 < value <= 1),
    "max_drop": (values.max_drop, lambda value: 0 <= value < 1),
    "number": (values.number, lambda value: not math.isnan(value)),
    "count": (values.count, lambda value: value >= 1),
    "memory_size": (values.memory_size, lambda value: values.LEAST_MEMORY <= value < math.inf),
    "device": (values.device, lambda value: value.partition(":")[0] in ("auto", "cpu", "cuda")),
    "model_name": (values.model_name, lambda value: value.strip() != ""),
    "one_of": (values.one_of("gate", "proved"), lambda value: value in ("gate", "proved")),
}
texts = st.one_of(
    st.text(),
    st.floats().map(str),
    st.integers().map(str),
    st.from_regex(r"[-+]?[0-9]*[.,]?[0-9]+ ?(%|[kKMGT]i?[bB]?|e[0-9]{1,4})?", fullmatch=True),
    st.from_regex(r"(gpu|cuda|cpu|auto):?[0-9]{0,4}", fullmatch=True),
)


@pytest.mark.parametrize("name", READERS)
@given(text=texts)
def test_what_is_read_is_in_range_and_all_else_is_named(name, text):
    read, in_range = READERS[name]
    said, value = None, None
    try:
        value = read(text)
    except InvalidArgument as problem:
        said = str(problem)
    assert in_range(value) if said is None else repr(text) in said


@given(st.floats(0, 1, exclude_min=True))
def test_every_keep_ratio_is_read_as_it_is_printed(ratio):
    assert values.keep_ratio(str(ratio)) == ratio


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("0,25", "; write 0.25, with a decimal point"),
        (",5", "; write 0.5, with a decimal point"),
        ("25 %", "; write 0.25"),
        ("1/3", "; write 0.333333"),
        ("1/0", ""),
        ("1 2", "; several are separated by commas on the command line, and a list in Python"),
        ("a quarter", ""),
    ],
)
def test_a_number_written_in_another_way_is_written_out(text, hint):
    with pytest.raises(InvalidArgument) as caught:
        values.number(text)
    assert str(caught.value) == f"expected a number, got {text!r}{hint}"


@pytest.mark.parametrize(
    ("text", "found"),
    [("0,25", "0.25"), ("0.5,0,1", "0.1"), ("a@0,5", "0.5"), ("0.5,0.25", ""), ("1,0.5", "")],
)
def test_a_decimal_comma_is_told_from_one_that_separates(text, found):
    expected = f"; did you mean {found}? a comma separates values" if found else ""
    assert values.decimal_comma(text) == expected
