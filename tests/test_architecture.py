"""Who may import whom. Imports point one way; heavy ones stay where they are needed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pytest_kvguard

HOME = Path(pytest_kvguard.__file__).parent
MOST_LINES = 350
MOST_FLOORS = 7  # of the engine, from what imports nothing of it to its loop

OURS = {
    "errors": set(),
    "progress": set(),
    "parameters": {"errors"},
    "repetition": set(),
    "specs": {"errors"},
    "storage": {"parameters", "errors"},
    "policies": {"storage", "parameters", "specs", "errors"},
    "tasks": {"hub", "specs", "errors"},
    "engine": {"progress", "storage", "policies", "errors"},
    "hub": {"errors"},
    "tokenizer_check": {"errors"},
    "models": {"hub", "tokenizer_check", "errors"},
    "values": {"errors"},
    "harness.score_test": set(),
    "harness.clustered": set(),
    "harness.stats": {"harness.clustered", "harness.score_test", "errors"},
    "harness.trial": {"harness.stats"},
    "harness.records": {"tasks", "specs", "errors"},
    "harness.refusals": {"harness.records"},
    "harness.compare": {"harness.records", "harness.refusals", "harness.stats", "errors"},
    "harness": {
        "progress", "repetition", "engine", "models", "policies", "tasks", "tokenizer_check",
        "errors",
    },
    "report": {"progress", "harness.compare", "harness.records"},
    "states": {"policies"},
    "laws": {"states", "policies", "errors"},
    "options": {"values", "specs", "errors"},
    "marker": {"options", "values", "specs", "errors"},
    "hookspecs": {"policies", "tasks"},
    "scheduling": set(),
    "session": {
        "marker", "options", "report", "harness", "engine", "models", "policies", "tasks", "specs",
        "errors", "progress",
    },
    "plugin": {
        "session", "scheduling", "hookspecs", "marker", "options", "values", "report", "harness",
        "models", "policies", "tasks", "errors",
    },
}  # fmt: skip
"""Each unit, the longest that a module's name begins with, and the units it may import."""

OUTSIDE = {
    "torch": {"storage", "policies", "engine", "models", "harness", "states", "laws", "session"},
    "transformers": {"engine", "models"},
    "huggingface_hub": {"hub"},
    "filelock": {"models"},
    "numpy": {
        "harness.clustered",
        "harness.stats",
        "harness.score_test",
        "harness.trial",
        "laws",
        "states",
    },
    "scipy": {"harness.clustered", "harness.stats", "harness.score_test"},
    "hypothesis": {"states", "laws"},
    "rich": {"report"},
    "datasets": {"hub", "tasks"},
    "jinja2": {"tasks"},
    "markdown_it": {"tasks"},
    "sentencex": {"tasks"},
    "gguf": {"models"},
    "tokenizers": {"models"},
    "kvpress": {"policies"},
    "xdist": {"scheduling"},
    "pytest": {"options", "marker", "hookspecs", "plugin", "report"},
}
"""Who may import what others wrote."""

LIGHT = {
    "errors",
    "progress",
    "specs",
    "values",
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


def room(dotted: str) -> str:
    """Name the part of the engine a module belongs to: a file, or a folder with all in it."""
    return dotted.split(".")[1] if "." in dotted else dotted


def test_the_engine_has_at_most_seven_floors():
    beneath: dict[str, set[str]] = {}
    for path in MODULES:
        if within(dotted(path), "engine"):
            names = imports(parsed(path), lazy=True)
            ours = [name.removeprefix(f"{HOME.name}.") for name in names]
            found = {room(name) for name in ours if within(name, "engine")}
            beneath.setdefault(room(dotted(path)), set()).update(found - {room(dotted(path))})
    floors: dict[str, int] = {}
    while left := beneath.keys() - floors.keys():
        ready = {name for name in left if beneath[name] <= floors.keys()}
        assert ready, f"these import each other: {sorted(left)}"
        floors |= {name: 1 + max((floors[x] for x in beneath[name]), default=0) for name in ready}
    assert max(floors.values()) <= MOST_FLOORS, floors


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
