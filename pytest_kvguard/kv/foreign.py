"""Caches compressed by other people's code, while transformers prefills a prompt as it always does.

The code hooks into the model; afterwards the model is as it was before. Which positions are held
is found by comparing keys with those the cache was given: what is kept unchanged is equal to the
last bit.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pytest_kvguard.errors import KVGuardError, Refused, Unavailable, Unsupported
from pytest_kvguard.kv.compress import AnyKept, Kept, KeptLayer, Source, pack, picked
from pytest_kvguard.kv.grid import Cell, Prompt
from pytest_kvguard.kv.prefill import Prefill
from pytest_kvguard.kv.rope import Rotation
from pytest_kvguard.kv.seam import Seam, cache_argument
from pytest_kvguard.policies.base import Foreign
from pytest_kvguard.policies.budgets import share


def keep_foreign(
    seam: Seam, prompt: Prompt, cell: Cell, full: Prefill, rotation: Rotation | None = None
) -> tuple[Kept, int]:
    """Let other people's code compress a prompt without its last token, which is fed again.

    Also returns how many prefills that took: one, and one more each time when more is held than
    the keep ratio allows and less is asked for. Raises Refused when not even that helps, and
    Unsupported for what is not a cache of some of the prompt's own keys.
    """
    policy = cell.policy
    if policy.foreign is None:
        raise AssertionError(f"{policy.name!r} is not other people's code")
    _check(prompt, cell, full)
    ids = prompt.ids[: prompt.fed]
    [state, *_] = full.states(prompt.about, prompt.protection(policy, seam.device))
    budget = policy.budget(state, cell.ratio)
    room = budget - (prompt.compressed - len(ids))
    asked, prefills = room, 0
    while asked > 0:
        # half a position more, so that no rounding takes one away
        ratio = 1.0 if asked == len(ids) else (asked + 0.5) / len(ids)
        prefills += 1
        layers = _run(seam, policy.name, policy.foreign, ratio, ids, budget)
        held = sum(float(layer.held.double().mean()) for layer in layers) / len(layers)
        if held <= room:
            if policy.rerotate and rotation is not None:
                layers = [pack(layer, len(ids), rotation) for layer in layers]
            return Kept(len(ids), tuple(layers)), prefills
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
    if len(full.compressible) < len(full.layers):
        raise Unsupported(
            f"{policy.name}: this model has sliding layers, which are left alone here but not by "
            f"other people's code; use a model with full attention in all layers"
        )


def _run(
    seam: Seam, name: str, foreign: Foreign, ratio: float, ids: Sequence[int], budget: int
) -> list[AnyKept]:
    cache = _Watched()
    tokens = torch.tensor([list(ids)], device=seam.device)
    with seam.lent() as model, _untouched(model), _reproducible(seam.device):
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
        _kept(name, index, layer.keys[0], layer.values[0], cache.given[index], budget)
        for index, layer in enumerate(cache.layers)
    ]


def _kept(
    name: str, index: int, keys: Tensor, values: Tensor, given: Tensor, budget: int
) -> KeptLayer:
    """Order what one layer holds by position. keys, values: (Hkv, n, D); given: (Hkv, T, D)."""
    positions = torch.tensor(
        [_find(*pair) for pair in zip(_rows(keys), _rows(given), strict=True)], device=keys.device
    )
    if bool((positions < 0).any()):
        raise Unsupported(
            f"{name} moves, merges or changes keys in layer {index}, so what it holds are no "
            f"positions of the prompt; to have keys moved to cache positions, write |rerotated"
        )
    ordered, order = positions.sort(dim=-1)
    return KeptLayer(
        layer=index,
        source=Source(picked(keys, order), picked(values, order)),
        index=None,
        positions=ordered,
        window=None,
        budget=budget,
    )


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
