from dataclasses import replace
from keyword import iskeyword

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kvguard.errors import InvalidArgument, UnknownName
from pytest_kvguard.specs import Spec, make, parse, parse_call, split

names = st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True).filter(lambda name: not iskeyword(name))
values = st.one_of(
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.text(),
    st.lists(st.integers()),
)
sources = st.sampled_from(["", "", "kvpress:"])
calls = st.builds(
    lambda source, name, params: Spec(source + name, params),
    sources,
    names,
    st.dictionaries(names, values, max_size=4),
)
ratios = st.none() | st.floats(0, 1, exclude_min=True) | st.just(1)


@st.composite
def specs(draw):
    first, decode = draw(calls), draw(st.none() | calls)
    ratio = None if decode is None else draw(ratios)
    modifiers = tuple(draw(st.lists(calls, max_size=3)))
    return Spec(first.name, first.params, decode, ratio, modifiers)


@given(specs())
def test_a_spec_is_read_back_from_what_it_prints(spec):
    assert parse(str(spec)) == spec
    assert parse(f"  {spec} ") == spec


@given(calls)
def test_a_single_name_is_read_alike_with_and_without_the_rest_of_the_grammar(spec):
    assert parse_call(str(spec)) == parse(str(spec)) == spec


@given(st.lists(specs(), max_size=4))
def test_a_list_comes_apart_at_the_commas_between_specs(several):
    assert [parse(piece) for piece in split(", ".join(map(str, several)))] == several


@given(specs())
def test_equal_specs_have_one_hash_whatever_the_order_of_their_parameters(spec):
    turned = replace(spec, params=dict(reversed(spec.params.items())))
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
    way = f"cannot read {text.strip()!r}; write name or name(key=value, ...)"
    with pytest.raises(InvalidArgument) as caught:
        parse_call(text)
    assert str(caught.value) == way
    with pytest.raises(InvalidArgument) as caught:
        parse(text)
    assert str(caught.value) == f"{way}, put together as prefill+decode@0.5|modifier"


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("shotkv+h2o", Spec("shotkv", decode=Spec("h2o"))),
        ("shotkv + h2o @ .5", Spec("shotkv", decode=Spec("h2o"), decode_ratio=0.5)),
        ("snapkv|kivi(bits=4)", Spec("snapkv", modifiers=(Spec("kivi", {"bits": 4}),))),
        (
            "a(x='+|@')+b(y=1)@1|c|d(z=2)",
            Spec(
                "a",
                {"x": "+|@"},
                Spec("b", {"y": 1}),
                1.0,
                (Spec("c"), Spec("d", {"z": 2})),
            ),
        ),
        ("kvpress:KnormPress", Spec("kvpress:KnormPress")),
        ("kvpress:A(b=1)+h2o", Spec("kvpress:A", {"b": 1}, Spec("h2o"))),
    ],
)
def test_a_policy_is_put_together_of_phases_and_modifiers(text, spec):
    assert parse(text) == spec


@pytest.mark.parametrize(
    ("text", "unreadable"),
    [
        ("a@0.5", "'a@0.5'"),
        ("a+b+c", "'b+c'"),
        ("a+", "''"),
        ("+b", "''"),
        ("a|", "''"),
        ("|b", "''"),
        ("a|b+c", "'b+c'"),
        ("a|b@0.5", "'b@0.5'"),
        ("a@0.5+b", "'a@0.5'"),
        ("a+b@", "the keep ratio '' in 'a+b@'"),
        ("a+b@half", "the keep ratio 'half' in 'a+b@half'"),
        ("a+b@-1", "the keep ratio '-1' in 'a+b@-1'"),
        ("a+b@0.5@0.5", "the keep ratio '0.5@0.5' in 'a+b@0.5@0.5'"),
        ("(a|b)", "'(a|b)'"),
        ("a:b:c", "'a:b:c'"),
        ("a: b:", "'a: b:'"),
    ],
)
def test_what_cannot_be_put_together_is_named(text, unreadable):
    with pytest.raises(InvalidArgument) as caught:
        parse(text)
    assert str(caught.value) == (
        f"cannot read {unreadable}; write name or name(key=value, ...), "
        f"put together as prefill+decode@0.5|modifier"
    )


@pytest.mark.parametrize("text", ["a+b", "a|b", "a+b@0.5"])
def test_only_policies_are_put_together(text):
    with pytest.raises(
        InvalidArgument, match=r"cannot read .*; write name or name\(key=value, ...\)$"
    ):
        parse_call(text)


def test_a_spec_without_its_parameters_is_its_names():
    assert parse("a(x=1)+b(y=2)@0.5|c(z=3)|d").names == "a+b|c|d"
    assert parse("a(x=1)").names == "a"


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
        ("a(b=')'), c(d=\"(\"), e", ["a(b=')')", 'c(d="(")', "e"]),
        ("a+b@0.5|c(d=1, e=2), f", ["a+b@0.5|c(d=1, e=2)", "f"]),
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
