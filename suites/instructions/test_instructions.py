"""Instructions: a system text with rules that every answer must obey, checked rule by rule."""

from pytest_kvguard import kv_sensitivity


@kv_sensitivity("instructions(without=never)", max_drop=0.10)
def test_rules_of_a_system_text(kv_result):
    assert kv_result.holds, kv_result.reason
