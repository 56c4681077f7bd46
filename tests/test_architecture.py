"""Who may import whom. Imports point one way; heavy ones stay where they are needed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pytest_kvguard

HOME = Path(pytest_kvguard.__file__).parent
MOST_LINES = 350

OURS = {
    "errors": set(),
    "progress": set(),
    "specs": {"errors"},
    "policies": {"specs", "errors"},
    "tasks": {"specs", "errors"},
    "kv": {"progress", "policies", "errors"},
    "models": {"errors"},
    "harness.score_test": set(),
    "harness.stats": {"harness.score_test", "errors"},
    "harness.trial": set(),
    "harness.records": {"tasks", "specs", "errors"},
    "harness.refusals": {"harness.records"},
    "harness.compare": {"harness.records", "harness.refusals", "harness.stats", "errors"},
    "harness": {"progress", "kv", "models", "policies", "tasks", "errors"},
    "report": {"progress", "harness.compare", "harness.records"},
    "states": {"policies"},
    "laws": {"states", "policies", "errors"},
    "options": {"specs", "errors"},
    "marker": {"options", "specs", "errors"},
    "hookspecs": {"policies", "tasks"},
    "scheduling": set(),
    "session": {
        "marker", "options", "report", "harness", "kv", "models", "policies", "tasks", "specs",
        "errors", "progress",
    },
    "plugin": {
        "session", "scheduling", "hookspecs", "marker", "options", "report", "harness", "models",
        "policies", "tasks", "specs", "errors",
    },
}  # fmt: skip
"""Each unit, the longest that a module's name begins with, and the units it may import."""

OUTSIDE = {
    "torch": {"policies", "kv", "models", "harness", "states", "laws", "session"},
    "transformers": {"kv", "models"},
    "numpy": {"harness.stats", "harness.score_test", "laws", "states"},
    "scipy": {"harness.stats", "harness.score_test", "harness.trial"},
    "hypothesis": {"states", "laws"},
    "rich": {"report"},
    "datasets": {"tasks"},
    "jinja2": {"tasks"},
    "markdown_it": {"tasks"},
    "sentencex": {"tasks"},
    "gguf": set(),
    "kvpress": {"policies"},
    "xdist": {"scheduling"},
    "pytest": {"options", "marker", "hookspecs", "plugin", "report"},
}
"""Who may import what others wrote."""

LIGHT = {
    "errors",
    "progress",
    "specs",
    "report",
    "options",
    "marker",
    "hookspecs",
    "session",
    "plugin",
}
"""What every pytest run imports: of the heavy packages, nothing at import time."""

MODULES = sorted(path for path in HOME.rglob("*.py") if path != HOME / "__init__.py")


def unit(dotted: str) -> str:
    """Return the unit a module, named from inside the package, belongs to."""
    return max((other for other in OURS if within(dotted, other)), key=len, default="")


def within(name: str, other: str) -> bool:
    return f"{name}.".startswith(f"{other}.")


def dotted(path: Path) -> str:
    parts = path.relative_to(HOME).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(node: ast.AST, *, lazy: bool) -> Iterator[str]:
    """Yield what is imported: everywhere, or without ``lazy`` only when the module is."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), level=0, names=names):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.ImportFrom():
                raise AssertionError("relative imports hide who imports whom")
            case ast.FunctionDef() if not lazy:
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) if not lazy:
                continue
            case _:
                yield from imports(child, lazy=lazy)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_one_way(path):
    here = unit(dotted(path))
    assert here, f"{dotted(path)} belongs to no unit"
    for name in imports(parsed(path), lazy=True):
        top, _, rest = name.partition(".")
        if top == HOME.name:
            there = unit(rest)
            allowed = any(within(there, other) for other in OURS[here] | {here})
            assert allowed, f"{here} may not import {there}"
        assert here in OUTSIDE.get(top, {here}), f"{here} may not import {top}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_what_every_run_imports_imports_nothing_heavy(path):
    if unit(dotted(path)) not in LIGHT:
        return
    for name in imports(parsed(path), lazy=False):
        top, _, rest = name.partition(".")
        assert top not in OUTSIDE.keys() - {"pytest"}, f"{name} must be imported where it is used"
        if top == HOME.name and rest:
            assert unit(rest) in LIGHT, f"{name} must be imported where it is used"


@pytest.mark.parametrize("path", [HOME / "__init__.py", *MODULES], ids=lambda p: p.stem)
def test_no_module_is_a_drawer_for_everything(path):
    assert path.stem not in {"utils", "util", "helpers", "common", "misc"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_every_permission_is_used():
    used = {
        (unit(dotted(path)), unit(name.partition(".")[2]))
        for path in MODULES
        for name in imports(parsed(path), lazy=True)
        if within(name, HOME.name)
    }
    stale = [
        f"{here} -> {other}"
        for here, others in OURS.items()
        for other in others
        if not any(here == importer and within(there, other) for importer, there in used)
    ]
    assert not stale
