"""Write docs/policies.md from the policies themselves: ``python docs/make_policies.py``.

The cells of the table are read from a policy's fields, or found by trying it on prompts that
differ in one thing. The sections are docstrings.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pytest_kvguard.policies import POLICIES
from pytest_kvguard.policies.base import DecodeState, LayerState, Modifier, Passage, Policy
from pytest_kvguard.policies.full import full
from pytest_kvguard.policies.modifiers import MODIFIERS
from pytest_kvguard.policies.snapkv import snapkv

PAGE = Path(__file__).with_name("policies.md")
LENGTH = 384  # positions; more than any default window or pair of runs
LAYERS = 4
RATIOS = (0.25, 0.5, 0.75)

INTRODUCTION = f"""\
# Policies

Written by `python docs/make_policies.py` from the policies themselves: change those, not this page.
[kvpress.md](kvpress.md) says where kvpress keeps the same and where it does not.

- **saves**: what the keep ratio is a share of: *positions*, of which keys and values are freed, or
  *reads* of a cache that stays whole
- **decides by**: what changes the selection when nothing else changes, tried on {LENGTH} tokens
- **heads**: key/value heads of a layer keep the *same positions*; *own positions*, but as many;
  or even an *own number*, and then each takes the memory of what it holds
- **layers**: all keep the *same number*, deeper ones *fewer*, or neighbours the *same positions*
- **while decoding**: which tokens may still be evicted then: *none*, *generated* ones or *any*
- **costs**: what comes on top of the prefill that all policies share and the pass that reads a
  draft
"""

COSTS = """\
*Own prefills*: a prompt is prefilled again for each keep ratio. *Sums*: the prefill adds up what
each position gets from all queries. *All queries*: the prefill records every query, not only the
last. *RoPE*: rotations are undone and redone. *Step by step*: a draft is read token by token
inside attention, and an answer that leaves it starts over.
"""

MODIFYING = """\
# Modifiers

Behind a bar, a modifier changes any policy it can: `snapkv|kivi(bits=4)`.

- **changes**: what is different about `snapkv` behind it
- **alone**: whether it does something to the full cache too; the keep ratio is then the share of
  its bytes
"""

FIELDS = {
    "queries": "",  # how many of them, `_looked_at` says
    "keys": "keys",
    "values": "values",
    "attention_sums": "all queries' attention",
    "output": "output projection",
    "turn": "RoPE",
    "units": "units",
    "passages": "parts of the prompt",
    "special": "special tokens",
    "punctuation": "punctuation",
}
"""What a policy may look at, and the words for it."""

CHANGES = {
    "importance": "what is kept",
    "budget": "what is kept",
    "select": "what is kept",
    "stays": "what must stay",
    "reuse": "which layers select",
    "rerotate": "where keys stand",
    "decode": "what goes while decoding",
    "store": "how it is stored",
    "read": "what is read",
}
"""What a modifier may replace, and the words for it."""

NEEDED = {"whitelist": {"first": 4}}
"""Parameters of modifiers that do nothing without."""

Factory = Callable[..., Policy] | Callable[..., Modifier]


def page() -> str:
    """Return the page."""
    head = ("policy", "paper", "saves", "decides by", "heads", "layers", "while decoding", "costs")
    rows = [_row(name, make()) for name, make in POLICIES.items()]
    modifiers = [_modifier(name, make(**NEEDED.get(name, {}))) for name, make in MODIFIERS.items()]
    return "\n".join(
        [
            INTRODUCTION,
            _table(head, rows),
            COSTS,
            *_sections(POLICIES),
            MODIFYING,
            _table(("modifier", "paper", "changes", "alone"), modifiers),
            *_sections(MODIFIERS),
        ]
    )


def _row(name: str, policy: Policy) -> tuple[str, ...]:
    return (
        _link(name, POLICIES[name]),
        _paper(POLICIES[name]),
        policy.saves,
        _looked_at(policy),
        _heads(policy),
        _layers(policy),
        _while_decoding(policy),
        _costs(policy),
    )


def _modifier(name: str, modify: Modifier) -> tuple[str, ...]:
    host = snapkv()
    changed = modify(host)
    words = {
        said: None
        for field, said in CHANGES.items()
        if getattr(changed, field) != getattr(host, field)
    }
    alone = "yes" if modify(full()).store else "no"
    return _link(name, MODIFIERS[name]), _paper(MODIFIERS[name]), ", ".join(words), alone


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [head, ["---"] * len(tuple(head)), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _looked_at(policy: Policy) -> str:
    """Name what changes the selection when it alone is changed."""
    if policy.read is not None:
        return "each query, keys"
    one, other = _prompt(seed=1), _prompt(seed=2)
    kept = _kept(policy, one)
    changed = [
        words or _queries(policy)
        for field, words in FIELDS.items()
        if _kept(policy, _with(one, other, field)) != kept
    ]
    return ", ".join(changed) or "position alone"


def _queries(policy: Policy) -> str:
    if policy.window >= LENGTH:
        return "all queries"
    return f"last {policy.window} queries" if policy.window > 1 else "last query"


def _heads(policy: Policy) -> str:
    if policy.read is not None:
        return "keep all"
    if policy.shares_heads:
        return "own number"
    masks = [policy.keep(state, ratio) for state in _prompt(seed=1) for ratio in RATIOS]
    return "same positions" if all((m == m[:1]).all() for m in masks) else "own positions"


def _layers(policy: Policy) -> str:
    if policy.read is not None:
        return "keep all"
    budgets = [policy.budget(state, RATIOS[0]) for state in _prompt(seed=1)]
    if budgets != sorted(budgets, reverse=True):
        raise AssertionError(f"no word for the budgets {budgets} of {policy.name}")
    if budgets[0] > budgets[-1]:
        return "fewer in deeper ones"
    return f"same positions in {policy.reuse}" if policy.reuse > 1 else "same number"


def _while_decoding(policy: Policy) -> str:
    if policy.decode is None:
        return "none"
    if policy.decode.candidates(_step())[_step().held & ~_step().generated].any():
        return "any"
    return "generated"


def _costs(policy: Policy) -> str:
    costs = {
        "own prefills": policy.narrows,
        "sums": policy.needs_sums,
        "all queries": policy.window >= LENGTH,
        "RoPE": policy.needs_turn,
        "step by step": policy.decode is not None,
    }
    return ", ".join(name for name, paid in costs.items() if paid) or "nothing"


def _kept(policy: Policy, prompt: Iterable[LayerState]) -> list[list[bool]]:
    return [policy.keep(state, ratio).tolist() for state in prompt for ratio in RATIOS]


def _with(one: Iterable[LayerState], other: Iterable[LayerState], field: str) -> list[LayerState]:
    pairs = zip(one, other, strict=True)
    return [replace(state, **{field: getattr(donor, field)}) for state, donor in pairs]


def _prompt(seed: int) -> list[LayerState]:
    """Return the layers of a prompt in which nothing is like in one of another seed."""
    draw = torch.Generator().manual_seed(seed)
    cuts = range(0, LENGTH + 1, 8 * seed)
    spans = [range(start, min(start + 8 * seed, LENGTH)) for start in cuts if start < LENGTH]
    kinds = ("shot", "document", "system")[seed:]
    return [
        LayerState(
            keys=torch.randn(2, LENGTH, 4, generator=draw),
            values=torch.randn(2, LENGTH, 4, generator=draw),
            queries=torch.randn(4, LENGTH, 4, generator=draw),
            scaling=0.5,
            protected=torch.zeros(LENGTH, dtype=torch.bool),
            units=tuple((span,) for span in spans),
            attention_sums=torch.rand(4, LENGTH, generator=draw),
            layer=layer,
            layers=LAYERS,
            output=torch.randn(4, 4, 8, generator=draw),
            turn=_turn(pace=seed),
            passages=tuple(Passage(kinds[at % len(kinds)], span) for at, span in enumerate(spans)),
            special=torch.rand(LENGTH, generator=draw) < 0.02,
            punctuation=torch.rand(LENGTH, generator=draw) < 0.1,
        )
        for layer in range(LAYERS)
    ]


def _turn(pace: int) -> Callable[[Tensor, Tensor], Tensor]:
    def turn(keys: Tensor, by: Tensor) -> Tensor:
        angle = by.unsqueeze(-1).float() * pace / torch.tensor([10.0, 100.0])
        first, second = keys.float().chunk(2, dim=-1)
        turned = (
            first * angle.cos() - second * angle.sin(),
            second * angle.cos() + first * angle.sin(),
        )
        return torch.cat(turned, dim=-1).to(keys.dtype)

    return turn


def _step() -> DecodeState:
    """Return a step of decoding after which one token too many is held of each kind."""
    slots, heads = 64, 2
    return DecodeState(
        weights=torch.rand(1, 2 * heads, slots),
        sums=torch.rand(1, heads, slots),
        positions=torch.arange(slots).expand(1, heads, slots),
        newest=torch.tensor([slots - 1]),
        prompt_length=torch.tensor([slots // 2]),
        budget=torch.tensor([slots // 2]),
        ratio=torch.tensor([0.5], dtype=torch.float64),
    )


def _sections(factories: Mapping[str, Factory]) -> list[str]:
    papers: dict[str, dict[str, Factory]] = {}
    for name, factory in factories.items():
        papers.setdefault(factory.__module__, {})[name] = factory
    return [_section(module, made) for module, made in papers.items()]


def _section(module: str, factories: Mapping[str, Factory]) -> str:
    """Return what the docstrings of a module and its factories say."""
    first, *rest = _paragraphs(_doc(sys.modules[module]))
    title, _, summary = first.partition(": ")
    made = [text for name, factory in factories.items() for text in _factory(name, factory)]
    return "\n".join([f"## {title}\n", summary[:1].upper() + summary[1:], *rest, *made])


def _factory(name: str, factory: Factory) -> list[str]:
    known = inspect.signature(factory).parameters.values()
    typed = ", ".join(f"{parameter.name}={parameter.default!r}" for parameter in known)
    first, *rest = _paragraphs(_doc(factory))
    return [f"`{name}({typed})`: {first}", *rest]


def _link(name: str, factory: Factory) -> str:
    title = _doc(sys.modules[factory.__module__]).partition(":")[0]
    return f"[`{name}`](#{title.lower().replace(' ', '-')})"


def _paper(factory: Factory) -> str:
    """Return links to the addresses a factory's module names."""
    doc = _doc(sys.modules[factory.__module__])
    found = dict.fromkeys(re.findall(r"https://[^\s,;:]+[^\s,;:.]", doc))
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


def _doc(thing: object) -> str:
    return inspect.getdoc(thing) or ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
