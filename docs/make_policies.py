"""Write docs/policies.md from the policies themselves: ``python docs/make_policies.py``.

The cells of the table are read from a policy's fields, or found by trying it on prompts that
differ in one thing. The sections are docstrings.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from pages import link, paper, sections, table
from torch import Tensor

from pytest_kvguard.policies import POLICIES
from pytest_kvguard.policies.base import DecodeState, LayerState, Modifier, Passage, Policy
from pytest_kvguard.policies.modifiers import MODIFIERS
from pytest_kvguard.policies.snapkv import snapkv
from pytest_kvguard.storage import FORMATS

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

Storage formats, `kivi` and others, are listed in [formats.md](formats.md). They also stand alone,
on the full cache: the keep ratio is then the share of its bytes.

- **changes**: what is different about `snapkv` behind it
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
    "read": "what is read",
}
"""What a modifier may replace, and the words for it."""

NEEDED = {"whitelist": {"first": 4}}
"""Parameters of modifiers that do nothing without."""


def page() -> str:
    """Return the page."""
    head = ("policy", "paper", "saves", "decides by", "heads", "layers", "while decoding", "costs")
    rows = [_row(name, make()) for name, make in POLICIES.items()]
    selecting = {name: make for name, make in MODIFIERS.items() if name not in FORMATS}
    modifiers = [_modifier(name, make(**NEEDED.get(name, {}))) for name, make in selecting.items()]
    return "\n".join(
        [
            INTRODUCTION,
            table(head, rows),
            COSTS,
            *sections(POLICIES),
            MODIFYING,
            table(("modifier", "paper", "changes"), modifiers),
            *sections(selecting),
        ]
    )


def _row(name: str, policy: Policy) -> tuple[str, ...]:
    return (
        link(name, POLICIES[name]),
        paper(POLICIES[name]),
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
    return link(name, MODIFIERS[name]), paper(MODIFIERS[name]), ", ".join(words)


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


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
