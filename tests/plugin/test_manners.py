"""What the plugin costs runs that have nothing to do with it."""

import sys

import pytest

from pytest_kvguard import _HOMES, __all__

HEAVY = {"torch", "transformers", "scipy", "numpy", "rich", "hypothesis", "datasets", "gguf"}

PLAIN = f"""
    import sys

    def test_plain(pytestconfig):
        assert pytestconfig.pluginmanager.has_plugin("kvguard")
        assert not {HEAVY} & sys.modules.keys()
"""


def test_a_run_without_our_tests_pays_nothing(pytester):
    file = pytester.makepyfile(test_it=PLAIN)
    others = ["-p", "no:hypothesispytest", "-p", "no:cacheprovider"]
    result = pytester.run(sys.executable, "-B", "-m", "pytest", *others, file)
    assert result.ret == 0
    ours = [line for line in result.outlines if "kv" in line]
    assert all(line.startswith("plugins: ") for line in ours)
    assert sorted(path.name for path in pytester.path.iterdir() if path.is_file()) == [
        "stderr",
        "stdout",
        "test_it.py",
    ]


def test_importing_the_package_imports_nothing_heavy(pytester):
    code = f"import sys, pytest_kvguard, pytest_kvguard.plugin; print({HEAVY} & sys.modules.keys())"
    result = pytester.run(sys.executable, "-c", code)
    assert result.outlines == ["set()"]


def test_every_public_name_is_there_on_first_use():
    import pytest_kvguard

    assert {*_HOMES, "kv_sensitivity"} == set(__all__)
    for name in __all__:
        assert getattr(pytest_kvguard, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'kv_sensitvity'"):
        pytest_kvguard.kv_sensitvity  # noqa: B018
