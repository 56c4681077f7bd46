"""Which positions of the KV cache survive: pure functions of tensors, one paper a file."""

from collections.abc import Callable

from pytest_kvguard.errors import InvalidArgument, UnknownName
from pytest_kvguard.policies.adakv import adakv, adapyramidkv
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.policies.chunkkv import chunkkv
from pytest_kvguard.policies.combine import combined
from pytest_kvguard.policies.criticalkv import criticalkv
from pytest_kvguard.policies.expected_attention import expected_attention
from pytest_kvguard.policies.fastgen import fastgen
from pytest_kvguard.policies.full import full
from pytest_kvguard.policies.h2o import h2o
from pytest_kvguard.policies.keydiff import keydiff
from pytest_kvguard.policies.knorm import knorm
from pytest_kvguard.policies.lagkv import lagkv
from pytest_kvguard.policies.modifiers import MODIFIERS
from pytest_kvguard.policies.observed_attention import observed_attention
from pytest_kvguard.policies.pyramidinfer import pyramidinfer, pyramidinfer_kv
from pytest_kvguard.policies.pyramidkv import pyramidkv
from pytest_kvguard.policies.quest import quest
from pytest_kvguard.policies.random_baselines import random_shots, random_tokens
from pytest_kvguard.policies.scope import scope
from pytest_kvguard.policies.shotkv import shotkv
from pytest_kvguard.policies.snapkv import snapkv
from pytest_kvguard.policies.sources import entry_point_names, from_entry_point, from_source
from pytest_kvguard.policies.streaming_llm import streaming_llm
from pytest_kvguard.policies.tova import tova
from pytest_kvguard.policies.vatp import vatp
from pytest_kvguard.specs import Spec, make, parse

POLICIES: dict[str, Callable[..., Policy]] = {
    "adakv": adakv,
    "adapyramidkv": adapyramidkv,
    "chunkkv": chunkkv,
    "criticalkv": criticalkv,
    "expected_attention": expected_attention,
    "fastgen": fastgen,
    "h2o": h2o,
    "keydiff": keydiff,
    "knorm": knorm,
    "lagkv": lagkv,
    "observed_attention": observed_attention,
    "pyramidinfer": pyramidinfer,
    "pyramidinfer_kv": pyramidinfer_kv,
    "pyramidkv": pyramidkv,
    "quest": quest,
    "random_shots": random_shots,
    "random_tokens": random_tokens,
    "scope": scope,
    "shotkv": shotkv,
    "snapkv": snapkv,
    "streaming_llm": streaming_llm,
    "tova": tova,
    "vatp": vatp,
}
"""Every policy by name. The full cache is none of them: it is the baseline."""


def get_policy(spec: Spec | str) -> Policy:
    """Make the policy a spec names, as typed: ``"snapkv(window=16)"``, ``"shotkv+h2o@0.5"``.

    A modifier that stands alone, or behind ``full``, is applied to the full cache. Raises
    UnknownName for a name or parameter nobody knows, InvalidArgument for a bad value.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    first, modifiers = Spec(spec.name, spec.params), spec.modifiers
    if spec.name in MODIFIERS:
        if spec.decode is not None:
            raise InvalidArgument(
                f"{spec.name} in {str(spec)!r} is a modifier, not a policy; write it behind a bar: "
                f"prefill+{spec.decode}|{first}"
            )
        policy, modifiers = full(), (first, *modifiers)
    elif first == Spec("full") and modifiers and spec.decode is None:
        policy = full()
    else:
        policy = _named(first)
    if spec.decode is not None:
        policy = combined(policy, _named(spec.decode), spec.decode_ratio)
    for modifier in modifiers:
        policy = make("modifier", modifier, MODIFIERS)(policy)
    return policy


def _named(spec: Spec) -> Policy:
    """Make one policy: ours or registered, of a source, or found by its entry point."""
    if spec.name in POLICIES:
        return make("policy", spec, POLICIES)
    if ":" in spec.name:
        return from_source(spec)
    others = entry_point_names()
    if spec.name in others:
        return from_entry_point(spec)
    raise UnknownName("policy", spec.name, [*POLICIES, *MODIFIERS, *others])


def register_policy(name: str, factory: Callable[..., Policy]) -> None:
    """Add a policy under a name that is still free, or again under its own.

    Raises InvalidArgument for a name that cannot be typed in a spec, or is taken.
    """
    if not name.isidentifier():
        raise InvalidArgument(f"a policy name must be a Python identifier, got {name!r}")
    taken = name == "full" or name in MODIFIERS
    if taken or POLICIES.setdefault(name, factory) is not factory:
        raise InvalidArgument(f"the policy name {name!r} is taken; choose another")
