"""Arithmetic: GSM8K with eight worked shots, answered with a chain of thought."""

from pytest_kvguard import kv_sensitivity


@kv_sensitivity("arithmetic", max_drop=0.10)
def test_gsm8k(kv_result):
    assert kv_result.holds, kv_result.reason
