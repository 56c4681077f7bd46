"""World knowledge: what the weights know; the shots only show how to answer."""

from pytest_kvguard import kv_sensitivity


@kv_sensitivity("world_knowledge", max_drop=0.10)
def test_mmlu(kv_result):
    assert kv_result.holds, kv_result.reason


@kv_sensitivity("facts", max_drop=0.10)
def test_facts(kv_result):
    assert kv_result.holds, kv_result.reason
