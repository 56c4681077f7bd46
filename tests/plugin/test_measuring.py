import pytest

from pytest_kvguard.policies import POLICIES

GRID = """
    from pytest_kvguard import kv_sensitivity

    @kv_sensitivity("recall", policies=["snapkv", "tova"], ratios=[0.5, 0.25])
    def test_recall(kv_result): pass
"""


def test_all_cells_of_a_task_cost_the_prefills_of_one(suite):
    suite.pytester.makepyfile(GRID)
    (alone,) = suite.cells("-k", "snapkv-0.25")
    together = suite.cells()
    assert len(together) == 4
    assert alone["counts"]["prefills"] == 24  # one a sample
    assert {cell["counts"]["prefills"] for cell in together} == {24}


def test_a_cell_has_the_same_numbers_alone_and_among_others(suite):
    suite.pytester.makepyfile(GRID)
    (alone,) = suite.cells("-k", "tova-0.25")
    among = suite.cells()[-1]
    for field in ("policy", "ratio", "base", "kept", "dp", "interval", "broke", "held"):
        assert alone[field] == among[field]


def test_cells_of_two_tests_with_the_same_task_are_run_together(suite):
    suite.pytester.makepyfile(
        """
        from pytest_kvguard import kv_sensitivity

        runs = set()

        @kv_sensitivity("recall", policies="snapkv")
        def test_one(kv_result):
            runs.add(id(kv_result.base))

        @kv_sensitivity("recall", policies="tova")
        def test_two(kv_result):
            runs.add(id(kv_result.base))

        @kv_sensitivity("recall", policies="tova", limit=20)
        def test_three(kv_result):
            assert kv_result.n == 20
            assert len(runs) == 1
            assert id(kv_result.base) not in runs
        """
    )
    suite().assert_outcomes(passed=3)


@pytest.mark.parametrize(
    ("marked", "options"),
    [(", limit=20", ()), (", limit=7", ("--kv-limit=20",)), ("", ("--kv-limit=20",))],
    ids=["marker", "both", "command line"],
)
def test_a_limit_takes_the_first_samples_and_no_others(suite, marked, options):
    suite.pytester.makepyfile(
        f"""
        from pytest_kvguard import kv_sensitivity

        @kv_sensitivity("recall"{marked})
        def test_first(kv_result):
            first = [f"q{{i}}" for i in range(20)]
            assert list(kv_result.base.scores) == list(kv_result.kept.scores) == first
        """
    )
    suite(*options).assert_outcomes(passed=1)


def test_a_test_may_compare_what_it_likes(suite):
    suite.pytester.makepyfile(
        """
        import pytest
        from pytest_kvguard.errors import InvalidArgument
        from recall import recall

        def test_by_name(kvguard):
            found = kvguard("recall(n=20)", policy="snapkv(window=4)", ratio=0.25, max_drop=0.3)
            assert (found.n, found.max_drop, found.kept.params["window"]) == (20, 0.3, 4)
            assert found.base.mean == 1.0
            assert found is not kvguard("recall(n=20)", policy="tova", ratio=0.25)

        def test_a_task_of_my_own(kvguard):
            found = kvguard(recall(n=22), policy="tova", ratio=0.9, limit=21)
            assert found.n == 21
            assert found.held.max <= 0.9

        def test_bad_ratio(kvguard):
            with pytest.raises(InvalidArgument, match="keep ratio must be in"):
                kvguard("recall", policy="tova", ratio=0)
        """
    )
    result = suite("--kv-report=kv.json")
    result.assert_outcomes(passed=3)
    found = [(cell["spec"], cell["n"], cell["ratio"]) for cell in suite.report()["cells"]]
    assert found == [("snapkv(window=4)", 20, 0.25), ("tova", 20, 0.25), ("tova", 21, 0.9)]


def test_a_task_object_can_be_marked(suite):
    suite.pytester.makepyfile(
        """
        from pytest_kvguard import kv_sensitivity
        from recall import recall

        @kv_sensitivity(recall(n=20), ratios=[0.5, 0.25])
        def test_mine(kv_result):
            assert kv_result.n == 20
        """
    )
    suite().assert_outcomes(passed=2)


def test_a_compressed_cache_can_be_looked_at_and_asked(suite):
    suite.pytester.makepyfile(
        """
        TEXT = " ".join(f"w{i}" for i in range(10, 49))  # and BOS: 40 tokens

        def test_cache(kv_cache, kv_model):
            cache = kv_cache(TEXT, policy="streaming_llm(sinks=2)", ratio=0.25)
            assert cache.positions(layer=1, head=0) == [0, 1, *range(32, 39)]
            assert cache.held.shape == (3, 2)
            assert cache.held.unique().tolist() == [0.25]
            assert cache.device == kv_model.model.device
            assert cache.full_bytes == 39 * 3 * 2 * 2 * 12 * 4  # layers, heads, K and V, float32
            assert cache.bytes * 39 == cache.full_bytes * 9
            assert len(cache.answer(max_new_tokens=3).split()) <= 3

        def test_nothing_is_lost_at_ratio_1(kv_cache):
            full = kv_cache(TEXT, policy="tova", ratio=1.0)
            assert full.bytes == full.full_bytes
            assert full.answer() == kv_cache(TEXT, policy="snapkv", ratio=1.0).answer()
        """
    )
    suite().assert_outcomes(passed=2)


def test_a_conftest_brings_its_own_model(suite):
    suite.pytester.makepyfile(
        conftest=f"""
        import pytest
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        from pytest_kvguard import wrap
        from recall import recall

        @pytest.fixture(scope="session")
        def kv_model():
            model = LlamaForCausalLM.from_pretrained({str(suite.model)!r})
            return wrap(model, AutoTokenizer.from_pretrained({str(suite.model)!r}), name="mine")

        def pytest_kvguard_tasks():
            return {{"recall": recall}}
        """
    )
    suite.pytester.makepyfile(GRID)
    result = suite("--kv-model=./none", "--kv-report=kv.json")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*= KV-cache sensitivity of mine =*"])
    assert suite.report()["model"] == "mine"


HOOKS = """
    from dataclasses import replace

    from pytest_kvguard import get_policy
    from recall import recall

    def lucky(seed=7):
        "Random tokens under a name of my own."
        return replace(get_policy("random_tokens(seed=%d)" % seed), name="lucky")

    def pytest_kvguard_policies():
        return {"{policy}": lucky}

    def pytest_kvguard_tasks():
        return {"{task}": recall}
"""


def test_a_conftest_adds_policies_and_tasks_by_name(suite):
    suite.pytester.makeconftest(HOOKS.replace("{policy}", "lucky").replace("{task}", "mine"))
    suite.pytester.makepyfile(GRID.replace('"recall"', '"mine(n=20)"'))
    cells = suite.cells("--kv-policy=lucky(seed=3),random_tokens(seed=3)", "--ratio=0.5")
    mine, random = cells
    assert (mine["policy"], mine["spec"], mine["n"]) == ("lucky", "lucky(seed=3)", 20)
    assert mine["broke"] == random["broke"]
    assert "lucky" not in POLICIES  # the run before is over


@pytest.mark.parametrize(
    ("policy", "task", "expected"),
    [
        ("snapkv", "mine", "the policy name 'snapkv' is taken; choose another"),
        ("lucky", "retrieval", "task 'retrieval' is already registered; choose another name"),
        ("my-policy", "mine", "a policy name must be a Python identifier, got 'my-policy'"),
    ],
)
def test_a_name_that_cannot_be_added_ends_the_run(suite, policy, task, expected):
    suite.pytester.makeconftest(HOOKS.replace("{policy}", policy).replace("{task}", task))
    suite.pytester.makepyfile(test_it=GRID)
    result = suite()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: test_it.py::test_recall: {expected}"])


UNITS = """
    from pytest_kvguard import kv_sensitivity

    @kv_sensitivity("recall", policies=["shotkv", "tova"])
    def test_shots(kv_result):
        assert kv_result.kept.units in ("shots", None)

    @kv_sensitivity("recall", policies="shotkv", units="sentences")
    def test_sentences(kv_result):
        assert kv_result.kept.units == "sentences"
"""


def test_units_are_chosen_by_the_marker_or_for_all_and_the_report_says_which(suite):
    suite.pytester.makepyfile(UNITS)
    by_marker = suite.cells()
    assert [cell["units"] for cell in by_marker] == ["shots", None, "sentences"]
    shots, _, sentences = by_marker
    assert shots["base"] == sentences["base"]
    result = suite("--kv-units=paragraphs")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["recall *shotkv (paragraphs) *0.5 *"])


def test_a_prompt_without_such_units_is_refused_only_under_a_policy_that_keeps_them(suite):
    suite.pytester.makepyfile(UNITS)
    kept, tokens, _ = suite.cells("--kv-units=code")
    assert kept["verdict"] == "refused"
    assert "this prompt has no units of the kind 'code' to keep whole; choose" in kept["reason"]
    assert tokens["verdict"] != "refused"
