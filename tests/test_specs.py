from keyword import iskeyword

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kvguard.errors import InvalidArgument, UnknownName
from pytest_kvguard.specs import Spec, make, parse, split

names = st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True).filter(lambda name: not iskeyword(name))
values = st.one_of(
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.text(),
    st.lists(st.integers()),
)
specs = st.builds(Spec, names, st.dictionaries(names, values, max_size=4))


@given(specs)
def test_a_spec_is_read_back_from_what_it_prints(spec):
    assert parse(str(spec)) == spec
    assert parse(f"  {spec} ") == spec


@given(st.lists(specs, max_size=4))
def test_a_list_comes_apart_at_the_commas_between_specs(several):
    whole = [spec for spec in several if not any("(" in str(v) for v in spec.params.values())]
    whole = [spec for spec in whole if not any(")" in str(v) for v in spec.params.values())]
    assert [parse(piece) for piece in split(", ".join(map(str, whole)))] == whole


@given(specs)
def test_equal_specs_have_one_hash_whatever_the_order_of_their_parameters(spec):
    turned = Spec(spec.name, dict(reversed(spec.params.items())))
    assert turned == spec
    assert hash(turned) == hash(spec)


@pytest.mark.parametrize(
    ("text", "params"),
    [
        ("snapkv", {}),
        ("snapkv()", {}),
        ("snapkv(window=16)", {"window": 16}),
        ("snapkv(a=-1, b=1e-3)", {"a": -1, "b": 0.001}),
        ("snapkv(a=True, b=false, c=None, d=none)", {"a": True, "b": False, "c": None, "d": None}),
        ("snapkv(pooling=max, path='a,b (c).json')", {"pooling": "max", "path": "a,b (c).json"}),
    ],
)
def test_values_are_literals_or_bare_words(text, params):
    assert parse(text) == Spec("snapkv", params)


@pytest.mark.parametrize(
    "text",
    ["", " ", "snap-kv", "1", "'snapkv'", "snapkv(16)", "snapkv(**x)", "a.b(c=1)", "snapkv("],
)
def test_what_is_no_spec_is_named_with_the_way_to_write_one(text):
    with pytest.raises(InvalidArgument) as caught:
        parse(text)
    assert str(caught.value) == (
        f"cannot read {text.strip()!r}; write name or name(key=value, ...)"
    )


@pytest.mark.parametrize("value", ["1 + x", "len(a)", "a.b", "lambda: 1"])
def test_a_value_that_is_an_expression_is_not_run(value):
    with pytest.raises(InvalidArgument, match="values are numbers, words or 'text'") as caught:
        parse(f"snapkv(window={value})")
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        (" , ,", []),
        ("a", ["a"]),
        ("a, b(c=1, d=2),e", ["a", "b(c=1, d=2)", "e"]),
        ("a(b=(1, 2), c=3), d", ["a(b=(1, 2), c=3)", "d"]),
    ],
)
def test_commas_inside_parentheses_part_nothing(text, pieces):
    assert split(text) == pieces


def double(number: int = 1, *, times: int = 2) -> int:
    return number * times


def test_a_factory_is_called_with_the_parameters_of_the_spec():
    factories = {"double": double}
    assert make("sum", Spec("double"), factories) == 2
    assert make("sum", Spec("double", {"number": 5, "times": 3}), factories) == 15


def test_a_name_or_parameter_nobody_knows_is_named_with_the_nearest_and_all_others():
    factories = {"double": double, "triple": double}
    with pytest.raises(UnknownName) as caught:
        make("sum", Spec("doubel"), factories)
    assert str(caught.value) == (
        "unknown sum 'doubel'; did you mean 'double'? known: double, triple"
    )
    with pytest.raises(UnknownName) as caught:
        make("sum", Spec("double", {"x": 3}), factories)
    assert str(caught.value) == "unknown parameter of double 'x'; known: number, times"
