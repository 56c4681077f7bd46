"""World knowledge: MMLU with five shots, answered with a letter."""

from pytest_kvguard import kv_sensitivity


@kv_sensitivity("world_knowledge", max_drop=0.10)
def test_world_knowledge(kv_result):
    assert kv_result.holds, kv_result.reason
