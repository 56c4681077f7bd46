"""Policies of kvpress, run by its own code: ``kvpress:SnapKVPress(window_size=16)``.

Devoto et al., 2025, https://arxiv.org/abs/2510.00636; https://github.com/NVIDIA/kvpress

importance, budget and selection are kvpress's. Its class compresses the cache of a prefill that
runs for one policy and one keep ratio alone, through transformers' own attention.

Differs from the other policies: units and protected positions are not honoured, so that a prompt
with protected parts is refused. What kvpress only masks, moves or merges is refused too: a keep
ratio is a share of positions that are really held, and each must be one of the prompt's.
"""

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pytest_kvguard.errors import InvalidArgument, Refused, Unavailable, UnknownName
from pytest_kvguard.parameters import frozen
from pytest_kvguard.policies.base import Foreign, LayerState, Policy
from pytest_kvguard.policies.budgets import check_ratio, keep_ratio
from pytest_kvguard.specs import Spec


def from_kvpress(spec: Spec) -> Policy:
    """Make a policy of the class of kvpress that a spec names, with its parameters.

    A parameter that is itself the name of such a class becomes one with its defaults:
    ``ChunkKVPress(press=SnapKVPress)``. Raises Unavailable without kvpress, UnknownName for a
    class it lacks, InvalidArgument for parameters the class dislikes, Refused as `kvpress_policy`.
    """
    classes = _classes()
    params = {name: _made(value, classes) for name, value in spec.params.items()}
    if spec.name not in classes:
        raise UnknownName("class of kvpress", spec.name, classes)
    if "compression_ratio" in params:
        raise InvalidArgument(
            f"kvpress:{spec.name}: compression_ratio is set by the keep ratio; leave it out"
        )
    try:
        press = classes[spec.name](**params)
    except Exception as problem:  # kvpress asserts, or lacks an argument
        raise InvalidArgument(
            f"kvpress:{spec.name} cannot be made: {type(problem).__name__}: {problem} (a wrapper "
            f"takes another class by name, as in kvpress:ChunkKVPress(press=SnapKVPress))"
        ) from problem
    return kvpress_policy(press, spec.params)


def kvpress_policy(press: Any, params: Mapping[str, Any] | None = None) -> Policy:
    """Make a policy of an object of kvpress; each prefill gets a copy of its own.

    params: what reports show of it. Raises Refused for one whose ratio cannot be set.
    """
    name = f"kvpress:{type(press).__name__}"
    _with_ratio(press, 0.5, name)
    return Policy(
        name,
        _kvpress_decides,
        keep_ratio,
        lambda importance, n, state: _kvpress_decides(state),
        params=frozen(**(params or {})),
        foreign=_foreign(press, name),
    )


def _foreign(press: Any, name: str) -> Foreign:
    return lambda ratio: _with_ratio(press, check_ratio(ratio), name)


def _with_ratio(press: Any, ratio: float, name: str) -> Any:
    """Return a copy that keeps this share of what it is shown; kvpress counts what goes."""
    own = copy.deepcopy(press)
    try:
        settled = own.compression_ratio is not None  # to set what is not there would do nothing
        own.compression_ratio = 1 - ratio
    except Exception as problem:  # a property without a setter asserts or raises as it likes
        raise _without_ratio(name) from problem
    if not settled or own.compression_ratio != 1 - ratio:
        raise _without_ratio(name)
    return own


def _without_ratio(name: str) -> Refused:
    return Refused(
        f"{name} has no compression_ratio that can be set: it compresses while decoding, or by a "
        f"rule or threshold of its own, so no keep ratio can be asked of it"
    )


def _kvpress_decides(state: LayerState) -> Tensor:
    raise InvalidArgument(
        "what kvpress keeps is decided in a prefill of its own, not by a layer's state"
    )


def _classes() -> dict[str, type]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what its imports warn of is nobody's concern here
            import kvpress
    except ImportError as problem:
        raise Unavailable(
            f"policies of kvpress need kvpress ({problem}): pip install 'pytest-kvguard[kvpress]', "
            f"in an environment of its own, for it needs transformers<5.3"
        ) from problem
    return {
        name: found
        for name, found in vars(kvpress).items()
        if inspect.isclass(found) and issubclass(found, kvpress.BasePress)
    }


def _made(value: Any, classes: Mapping[str, type]) -> Any:
    return classes[value]() if isinstance(value, str) and value in classes else value
