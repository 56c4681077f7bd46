"""Names with parameters, as typed on a command line: ``snapkv(window=16)``."""

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pytest_kvguard.errors import InvalidArgument, UnknownName

Made = TypeVar("Made")


@dataclass(frozen=True)
class Spec:
    """A name and its keyword parameters."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.name)  # the parameters may come in any order

    def __str__(self) -> str:
        if not self.params:
            return self.name
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.params.items())})"


def parse(text: str) -> Spec:
    """Read ``name`` or ``name(key=value, ...)``; values are Python literals or bare words.

    Raises InvalidArgument with the text when it is neither.
    """
    text = text.strip()
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        node = None
    match node:
        case ast.Name(id=name):
            return Spec(name)
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords) if all(
            k.arg for k in keywords
        ):
            return Spec(name, {str(k.arg): _value(k.value, text) for k in keywords})
    raise InvalidArgument(f"cannot read {text!r}; write name or name(key=value, ...)")


def split(text: str) -> list[str]:
    """Split at the commas and line ends outside parentheses; empty pieces are dropped."""
    pieces, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if char in ",\n" and depth == 0:
            pieces.append(text[start:at])
            start = at + 1
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces if piece.strip()]


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


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise InvalidArgument(
            f"cannot read {ast.unparse(node)!r} in {text!r}; values are numbers, words or 'text'"
        ) from None
