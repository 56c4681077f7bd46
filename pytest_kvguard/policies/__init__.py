"""Which positions of the KV cache survive: pure functions of tensors, one paper a file."""

from collections.abc import Callable

from pytest_kvguard.errors import InvalidArgument
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.policies.chunkkv import chunkkv
from pytest_kvguard.policies.h2o import h2o
from pytest_kvguard.policies.knorm import knorm
from pytest_kvguard.policies.observed_attention import observed_attention
from pytest_kvguard.policies.pyramidkv import pyramidkv
from pytest_kvguard.policies.random_baselines import random_shots, random_tokens
from pytest_kvguard.policies.shotkv import shotkv
from pytest_kvguard.policies.snapkv import snapkv
from pytest_kvguard.policies.streaming_llm import streaming_llm
from pytest_kvguard.policies.tova import tova
from pytest_kvguard.specs import Spec, make, parse

POLICIES: dict[str, Callable[..., Policy]] = {
    "chunkkv": chunkkv,
    "h2o": h2o,
    "knorm": knorm,
    "observed_attention": observed_attention,
    "pyramidkv": pyramidkv,
    "random_shots": random_shots,
    "random_tokens": random_tokens,
    "shotkv": shotkv,
    "snapkv": snapkv,
    "streaming_llm": streaming_llm,
    "tova": tova,
}
"""Every policy by name. The full cache is none of them: it is the baseline."""


def get_policy(spec: Spec | str) -> Policy:
    """Make the policy a spec names, as typed: ``"snapkv(window=16)"``.

    Raises UnknownName for a name or parameter nobody knows, InvalidArgument for a bad value.
    """
    return make("policy", parse(spec) if isinstance(spec, str) else spec, POLICIES)


def register_policy(name: str, factory: Callable[..., Policy]) -> None:
    """Add a policy under a name that is still free, or again under its own.

    Raises InvalidArgument for a name that cannot be typed in a spec, or is taken.
    """
    if not name.isidentifier():
        raise InvalidArgument(f"a policy name must be a Python identifier, got {name!r}")
    if name == "full" or POLICIES.setdefault(name, factory) is not factory:
        raise InvalidArgument(f"the policy name {name!r} is taken; choose another")
