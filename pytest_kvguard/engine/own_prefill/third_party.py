"""Third-party prefill: other code compresses a cache while transformers prefills as it always does.

The code hooks into the model; afterwards the model is as it was before. Which positions are held
is found by comparing keys with those the cache was given: what is kept unchanged is equal to the
last bit.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pytest_kvguard.engine.grid import Cell, Prompt
from pytest_kvguard.engine.model import AttentionHook, cache_argument
from pytest_kvguard.engine.rope import Rotation
from pytest_kvguard.engine.select import Kept, repositioned
from pytest_kvguard.engine.stack import Prefill
from pytest_kvguard.errors import KVGuardError, Refused, Unavailable, Unsupported
from pytest_kvguard.policies.base import EMPTY, Foreign
from pytest_kvguard.policies.budgets import share


def keep_third_party(
    hook: AttentionHook, prompt: Prompt, cell: Cell, full: Prefill, rotation: Rotation | None = None
) -> Kept:
    """Let other people's code compress a prompt without its last token, which is fed again.

    That takes a prefill, and one more each time when more is held than the keep ratio allows and
    less is asked for. Raises Refused when not even that helps, and
    Unsupported for what is not a cache of some of the prompt's own keys.
    """
    policy = cell.policy
    if policy.foreign is None:
        raise AssertionError(f"{policy.name!r} is not other people's code")
    _check(prompt, cell, full)
    ids = prompt.ids[: prompt.fed]
    [state, *_] = full.states(prompt.about, prompt.protection(policy, hook.device))
    budget = policy.budget(state, cell.ratio)
    room = budget - (prompt.compressed - len(ids))
    asked = room
    while asked > 0:
        # half a position more, so that no rounding takes one away
        ratio = 1.0 if asked == len(ids) else (asked + 0.5) / len(ids)
        found = _run(hook, policy.name, policy.foreign, ratio, ids)
        held = sum(len(at[0]) for at, _, _ in found) / len(found)
        if held <= room:
            return _kept(full, len(ids), found, budget, rotation if policy.rerotate else None)
        asked = min(asked - 1, share(asked, room / held))
    raise Refused(
        f"{policy.name} holds more than {room} of {len(ids)} positions whatever it is asked, and "
        f"keep ratio {cell.ratio:g} allows no more; raise the keep ratio"
    )


def _check(prompt: Prompt, cell: Cell, full: Prefill) -> None:
    policy = cell.policy
    if any(at < prompt.compressed for at in prompt.protected):
        raise Refused(
            f"{policy.name} does not honour protected parts of a prompt; leave --kv-protect out, "
            f"or use a policy of this package"
        )
    if policy.needs_sums:
        raise Unsupported(
            f"{policy.name} leaves no sums of attention for a decode phase to go on from; "
            f"combine it with one that needs none, such as tova"
        )
    if len(full.stack.compressible) < len(full.stack.layers):
        raise Unsupported(
            f"{policy.name}: this model has sliding layers, which are left alone here but not by "
            f"other people's code; use a model with full attention in all layers"
        )


Found = tuple[Tensor, Tensor, Tensor]
"""Positions (Hkv, n) in order, keys and values (Hkv, n, D)."""


def _kept(
    full: Prefill, length: int, found: Sequence[Found], budget: int, rotation: Rotation | None
) -> Kept:
    """Put together what all layers hold of the first ``length`` positions."""
    most = max(at.shape[1] for at, _, _ in found)
    positions = torch.stack([F.pad(at, (0, most - at.shape[1]), value=EMPTY) for at, _, _ in found])
    held = torch.tensor([[at.shape[1]] * len(at) for at, _, _ in found])
    own = tuple((keys, values) for _, keys, values in found)
    kept = Kept(full, length, positions, held, (budget,) * len(found), own)
    return kept if rotation is None else repositioned(kept, own, rotation)


def _run(
    hook: AttentionHook, name: str, foreign: Foreign, ratio: float, ids: Sequence[int]
) -> list[Found]:
    cache = _Watched()
    tokens = torch.tensor([list(ids)], device=hook.device)
    hook.prefills += 1
    with hook.lent() as model, _untouched(model), _reproducible(hook.device):
        try:
            with foreign(ratio)(model):
                model(
                    input_ids=tokens,
                    use_cache=True,
                    logits_to_keep=1,
                    **cache_argument(model, cache),
                )
        except KVGuardError:
            raise
        except OSError as problem:  # what the hub's errors have in common
            raise Unavailable(
                f"{name} needs files that cannot be had: {problem}; fetch them once with a network"
            ) from problem
        except Exception as problem:  # other people's code may fail in any way
            raise Unsupported(
                f"{name} cannot compress {len(ids)} tokens of {type(model).__name__}: "
                f"{type(problem).__name__}: {problem}"
            ) from problem
        if any(getattr(each, "masked_key_indices", None) is not None for each in model.modules()):
            raise Unsupported(
                f"{name} masks positions and frees none, so its memory is the full cache's; "
                f"use a policy that evicts, such as adakv"
            )
    return [
        _ordered(name, index, layer.keys[0], layer.values[0], cache.given[index])
        for index, layer in enumerate(cache.layers)
    ]


def _ordered(name: str, index: int, keys: Tensor, values: Tensor, given: Tensor) -> Found:
    """Order what one layer holds by position. keys, values: (Hkv, n, D); given: (Hkv, T, D)."""
    positions = torch.tensor(
        [_find(*pair) for pair in zip(_rows(keys), _rows(given), strict=True)], device=keys.device
    )
    if bool((positions < 0).any()):
        raise Unsupported(
            f"{name} moves, merges or changes keys in layer {index}, so what it holds are no "
            f"positions of the prompt; to have keys moved to cache positions, write |rerotated"
        )
    at, order = positions.sort(dim=-1)
    head = torch.arange(len(order), device=order.device)[:, None]
    return at, keys[head, order], values[head, order]


def _find(held: Sequence[bytes], given: Sequence[bytes]) -> list[int]:
    """Return where each held key was given, -1 where nowhere (again)."""
    places: defaultdict[bytes, list[int]] = defaultdict(list)
    for at in reversed(range(len(given))):
        places[given[at]].append(at)
    return [places[key].pop() if places[key] else -1 for key in held]


def _rows(keys: Tensor) -> list[list[bytes]]:
    """Return the bytes of each key: (Hkv, n, D) -> by head, by position."""
    raw = keys.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [[row.tobytes() for row in head] for head in raw]


class _Watched(DynamicCache):  # type: ignore[misc]  # transformers is not typed here
    """A cache that remembers the keys it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[int, Tensor] = {}  # by layer, (Hkv, T, D)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.given[layer_idx] = keys[0].clone()  # who compresses may write in place
        return keys, values


@contextmanager
def _untouched(model: PreTrainedModel) -> Iterator[None]:
    """Take off a model's modules afterwards what was put on them: attributes, modules and hooks."""
    before = [(store, set(store)) for module in model.modules() for store in _stores(module)]
    try:
        yield
    finally:
        for store, names in before:
            for name in store.keys() - names:
                del store[name]


def _stores(module: torch.nn.Module) -> list[dict[Any, Any]]:
    """Return all that a module holds things in: itself, and its tables of parts and hooks."""
    return [vars(module), *(held for held in vars(module).values() if isinstance(held, dict))]


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Let code that draws at random draw the same each time, and leave the random state alone."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield
