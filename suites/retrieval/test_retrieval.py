"""Retrieval: something said once in a long text, asked for at its end."""

from pytest_kvguard import kv_sensitivity


@kv_sensitivity("retrieval", max_drop=0.10)
def test_needles(kv_result):
    assert kv_result.holds, kv_result.reason


@kv_sensitivity("retrieval_facts", max_drop=0.10)
def test_facts_among_filler(kv_result):
    assert kv_result.holds, kv_result.reason
