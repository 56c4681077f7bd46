"""Retrieval: numbers hidden in filler, asked for by their keys, after RULER."""

from pytest_kvguard import kv_sensitivity


@kv_sensitivity("retrieval", max_drop=0.10)
def test_retrieval(kv_result):
    assert kv_result.holds, kv_result.reason
