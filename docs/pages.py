"""Pages of Markdown written from docstrings: tables, and a section for each module."""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Factory = Callable[..., Any]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(tuple(head)), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def sections(factories: Mapping[str, Factory]) -> list[str]:
    """Return a section for each module, with the factories that come from it."""
    papers: dict[str, dict[str, Factory]] = {}
    for name, factory in factories.items():
        papers.setdefault(factory.__module__, {})[name] = factory
    return [_section(module, made) for module, made in papers.items()]


def _section(module: str, factories: Mapping[str, Factory]) -> str:
    """Return what the docstrings of a module and its factories say."""
    first, *rest = _paragraphs(doc(sys.modules[module]))
    title, _, summary = first.partition(": ")
    made = [text for name, factory in factories.items() for text in _factory(name, factory)]
    return "\n".join([f"## {title}\n", summary[:1].upper() + summary[1:], *rest, *made])


def _factory(name: str, factory: Factory) -> list[str]:
    known = inspect.signature(factory).parameters.values()
    typed = ", ".join(f"{parameter.name}={parameter.default!r}" for parameter in known)
    first, *rest = _paragraphs(doc(factory))
    return [f"`{name}({typed})`: {first}", *rest]


def link(name: str, factory: Factory) -> str:
    """Return a link to the section of a factory's module."""
    title = doc(sys.modules[factory.__module__]).partition(":")[0]
    return f"[`{name}`](#{title.lower().replace(' ', '-')})"


def paper(factory: Factory) -> str:
    """Return links to the addresses a factory's module names."""
    said = doc(sys.modules[factory.__module__])
    found = dict.fromkeys(re.findall(r"https://[^\s,;:]+[^\s,;:.]", said))
    return ", ".join(f"[{address.rpartition('/')[2]}]({address})" for address in found)


def _paragraphs(doc: str) -> list[str]:
    """Return the paragraphs as Markdown; lines of a word, a gap and a text become a list."""
    text = doc.replace("``", "`").replace("Differs from", "**Differs** from")
    return [_markdown(paragraph) + "\n" for paragraph in text.split("\n\n")]


def _markdown(paragraph: str) -> str:
    if re.match(r"\w+ {2,}", paragraph):
        entries = [
            re.split(r" {2,}", line, maxsplit=1) for line in re.split(r"\n(?=\w)", paragraph)
        ]
        return "\n".join(f"- *{word}*: {' '.join(said.split())}" for word, said in entries)
    return " ".join(re.sub(r"(https://\S+\w)\n", r"\1; ", paragraph).split())


def doc(thing: object) -> str:
    """Return a docstring, without what it is indented by."""
    return inspect.getdoc(thing) or ""
