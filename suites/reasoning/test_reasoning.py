"""Reasoning: word problems whose quantities are defined in the shots, two and four at a time."""

from pytest_kvguard import kv_sensitivity


@kv_sensitivity("word_problems(steps=2)", max_drop=0.10)
def test_two_steps(kv_result):
    assert kv_result.holds, kv_result.reason


@kv_sensitivity("word_problems(steps=4)", max_drop=0.10)
def test_four_steps(kv_result):
    assert kv_result.holds, kv_result.reason
