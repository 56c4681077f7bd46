"""Names with parameters, as typed on a command line: ``snapkv(window=16)``.

A policy may be put together: ``shotkv+h2o@0.5|kivi(bits=4)`` is ShotKV for the prompt, H2O with a
keep ratio of its own while decoding, and after each bar a modifier of all that stands before it.
"""

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pytest_kvguard.errors import InvalidArgument, UnknownName

Made = TypeVar("Made")

TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""", re.DOTALL)
"""A quoted text, or any other character."""

SOURCE = re.compile(r"([^\W\d]\w*:)?(.*)", re.DOTALL)
"""Where a name comes from, if it says so, and the rest: ``kvpress:KnormPress``."""

NUMBER = re.compile(r"\d+\.?\d*(e-?\d+)?|\.\d+(e-?\d+)?")
PLAIN = "name or name(key=value, ...)"
JOINED = f"{PLAIN}, put together as prefill+decode@0.5|modifier"


@dataclass(frozen=True)
class Spec:
    """A name and its keyword parameters; of a policy, also what it is put together with."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    decode: "Spec | None" = None  # the policy whose decode phase is used
    decode_ratio: float | None = None  # keep ratio while decoding, only with `decode`
    modifiers: tuple["Spec", ...] = ()  # the first is applied first

    def __hash__(self) -> int:
        # the parameters may come in any order
        return hash((self.name, self.decode, self.decode_ratio, self.modifiers))

    def __str__(self) -> str:
        text = self.name
        if self.params:
            text += f"({', '.join(f'{key}={value!r}' for key, value in self.params.items())})"
        if self.decode is not None:
            text += f"+{self.decode}"
        if self.decode_ratio is not None:
            text += f"@{self.decode_ratio!r}"
        return "|".join([text, *map(str, self.modifiers)])

    @property
    def names(self) -> str:
        """The same without parameters and ratio: ``shotkv+h2o|kivi``."""
        phases = [self.name] if self.decode is None else [self.name, self.decode.name]
        return "|".join(["+".join(phases), *(modifier.name for modifier in self.modifiers)])


def parse(text: str) -> Spec:
    """Read ``prefill``, ``prefill+decode`` or ``prefill+decode@ratio``, then any ``|modifier``.

    Each of them is ``name`` or ``name(key=value, ...)``. Raises InvalidArgument with what is
    something else.
    """
    phases, *modifiers = _cut(text, "|")
    prefill, *decoding = _cut(phases, "+")
    decode, *ratio = _cut("+".join(decoding), "@")  # a second + is no part of a name
    first = _call(prefill, JOINED)
    return Spec(
        first.name,
        first.params,
        decode=_call(decode, JOINED) if decoding else None,
        decode_ratio=_number("@".join(ratio), phases) if ratio else None,
        modifiers=tuple(_call(modifier, JOINED) for modifier in modifiers),
    )


def parse_call(text: str) -> Spec:
    """Read ``name`` or ``name(key=value, ...)``; values are Python literals or bare words.

    Raises InvalidArgument with the text when it is neither.
    """
    return _call(text, PLAIN)


def split(text: str) -> list[str]:
    """Split at commas and line ends outside parentheses and quotes; drop what is empty."""
    return [piece for piece in _cut(text, ",\n") if piece]


def make(kind: str, spec: Spec, factories: Mapping[str, Callable[..., Made]]) -> Made:
    """Call the factory of that name with the parameters of the spec.

    Raises UnknownName for a name or a parameter nobody knows, and passes on InvalidArgument from
    a factory that dislikes a value.
    """
    if spec.name not in factories:
        raise UnknownName(kind, spec.name, factories)
    factory = factories[spec.name]
    known = [
        p.name
        for p in inspect.signature(factory).parameters.values()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    for name in spec.params:
        if name not in known:
            raise UnknownName(f"parameter of {spec.name}", name, known)
    return factory(**spec.params)


def _cut(text: str, marks: str) -> list[str]:
    """Cut at the marks outside parentheses and quotes."""
    pieces, depth, start = [], 0, 0
    for token in TOKEN.finditer(text):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if token[0] in marks and depth == 0:
            pieces.append(text[start : token.start()])
            start = token.end()
    return [piece.strip() for piece in [*pieces, text[start:]]]


def _call(text: str, way: str) -> Spec:
    source, rest = SOURCE.fullmatch(text.strip()).groups(default="")  # type: ignore[union-attr]
    try:
        node = ast.parse(rest, mode="eval").body
    except (SyntaxError, ValueError):  # the latter for a null byte
        node = None
    match node:
        case ast.Name(id=name):
            return Spec(source + name)
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords) if all(
            k.arg for k in keywords
        ):
            return Spec(source + name, {str(k.arg): _value(k.value, text) for k in keywords})
    raise InvalidArgument(f"cannot read {text.strip()!r}; write {way}")


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise InvalidArgument(
            f"cannot read {ast.unparse(node)!r} in {text!r}; values are numbers, words or 'text'"
        ) from None


def _number(text: str, whole: str) -> float:
    if NUMBER.fullmatch(text) is None:
        raise InvalidArgument(f"cannot read the keep ratio {text!r} in {whole!r}; write {JOINED}")
    return float(text)
