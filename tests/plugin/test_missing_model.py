"""A model that cannot be had is one error for the run."""

import pytest

from tests.plugin.test_options import MARKED, NAMES, items, sentence

TWO_TESTS = f"""
    {MARKED}
    @kv_sensitivity("recall", policies=["tova", "snapkv"], ratios=0.5)
    def test_more(kv_result): pass

    def test_cache(kv_cache): pass

    def test_other(): pass
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--kv-model=./none", "InvalidArgument: there is no model folder at './none'"),
        ("--kv-model=.", "InvalidArgument: the folder '.' holds no config.json, so it is no model"),
        ("--kv-model=m.gguf", "InvalidArgument: there is no GGUF file at 'm.gguf'"),
        (
            "--kv-model=a/b/c",
            "InvalidArgument: there is no model folder 'a/b/c', and it is no hub ",
        ),
        ("--kv-model=no/such", "Unavailable: cannot have model 'no/such': there is no folder of "),
        ("--kv-model=resoner", "Unavailable: cannot have model 'resoner': "),
        ("--kv-device=cuda:99", "InvalidArgument: device 'cuda:99' was asked for, but torch sees "),
    ],
)
def test_a_model_that_cannot_be_had_ends_the_run_once_before_anything_is_run(
    suite, given, expected
):
    suite.pytester.makepyfile(TWO_TESTS)
    result = suite(given)
    assert sentence(result).startswith(f"ERROR: {expected}")
    assert "passed" not in result.stdout.str()


def test_a_run_that_wants_no_model_asks_for_none(suite):
    suite.pytester.makepyfile(TWO_TESTS)
    suite("--kv-model=./none", "-k", "other").assert_outcomes(passed=1, deselected=4)
    assert len(items(suite("--kv-model=./none", *NAMES))) == 5


def test_a_model_of_ones_own_is_not_looked_for(suite):
    suite.pytester.makepyfile(
        """
        import pytest

        @pytest.fixture(scope="session")
        def kv_model():
            return "mine"

        def test_mine(kv_model):
            assert kv_model == "mine"
        """
    )
    suite("--kv-model=./none").assert_outcomes(passed=1)


@pytest.fixture
def broken(suite):
    """A model folder that looks right from outside."""
    folder = suite.pytester.mkdir("broken")
    for path in suite.model.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").write_text("no weights", encoding="utf-8")
    return folder


def test_a_model_that_cannot_be_loaded_fails_one_test_and_skips_the_others(suite, broken):
    suite.pytester.makepyfile(TWO_TESTS)
    result = suite(f"--kv-model={broken}", "-rs")
    result.assert_outcomes(errors=1, skipped=3, passed=1)
    result.stdout.fnmatch_lines(
        [
            "*_ ERROR at setup of test_recall*",
            "Unavailable: cannot load model '*broken': *",
            "SKIPPED * the model cannot be loaded; the first test that wants it says why",
        ]
    )
    assert result.stdout.str().count("cannot load model") == 1


def test_of_two_workers_one_says_that_there_is_no_model(suite):
    suite.pytester.makepyfile(test_a=TWO_TESTS, test_b=TWO_TESTS)
    result = suite.pytester.runpytest_subprocess(
        "--kv-model=./none", "-n2", "--dist=loadfile", "-p", "no:cacheprovider"
    )
    result.assert_outcomes(errors=1, skipped=7, passed=2)
