"""Reasoning: word problems whose quantities are defined in the shots, one to three at a time."""

from pytest_kvguard import kv_sensitivity


@kv_sensitivity("word_problems(steps=1)", max_drop=0.10)
def test_one_step(kv_result):
    assert kv_result.holds, kv_result.reason


@kv_sensitivity("word_problems(steps=2)", max_drop=0.10)
def test_two_steps(kv_result):
    assert kv_result.holds, kv_result.reason


@kv_sensitivity("word_problems(steps=3)", max_drop=0.10)
def test_three_steps(kv_result):
    assert kv_result.holds, kv_result.reason
