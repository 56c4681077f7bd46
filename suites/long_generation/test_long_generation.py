"""Long generation: several problems in one prompt, answered in one go, after LongGenBench."""

from pytest_kvguard import kv_sensitivity


@kv_sensitivity("long_generation", max_drop=0.10)
def test_long_generation(kv_result):
    assert kv_result.holds, kv_result.reason
