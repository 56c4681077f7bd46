"""pytest-kvguard: tests whether KV-cache compression broke your language model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pytest_kvguard.marker import kv_sensitivity

if TYPE_CHECKING:
    from pytest_kvguard.harness.compare import Comparison
    from pytest_kvguard.laws import check_policy
    from pytest_kvguard.models import wrap
    from pytest_kvguard.policies import get_policy, register_policy
    from pytest_kvguard.policies.base import LayerState, Policy
    from pytest_kvguard.tasks import get_task, register_task
    from pytest_kvguard.tasks.base import Part, Sample, Task

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "LayerState",
    "Part",
    "Policy",
    "Sample",
    "Task",
    "check_policy",
    "get_policy",
    "get_task",
    "kv_sensitivity",
    "register_policy",
    "register_task",
    "wrap",
]

_HOMES = {
    "Comparison": "harness.compare",
    "LayerState": "policies.base",
    "Part": "tasks.base",
    "Policy": "policies.base",
    "Sample": "tasks.base",
    "Task": "tasks.base",
    "check_policy": "laws",
    "get_policy": "policies",
    "get_task": "tasks",
    "register_policy": "policies",
    "register_task": "tasks",
    "wrap": "models",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the plugin itself stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
