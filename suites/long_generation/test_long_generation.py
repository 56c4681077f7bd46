"""Long generation: several problems in one prompt, answered in one go, after LongGenBench."""

from pytest_kvguard import kv_sensitivity


@kv_sensitivity("long_generation", max_drop=0.10)
def test_gsm8k_in_one_go(kv_result):
    assert kv_result.holds, kv_result.reason


@kv_sensitivity("long_answers", max_drop=0.10)
def test_many_questions_in_one_go(kv_result):
    assert kv_result.holds, kv_result.reason
