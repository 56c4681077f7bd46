import pytest

GRID = """
    from pytest_kvguard import kv_sensitivity

    @kv_sensitivity("recall", policies=["shotkv", "tova"], ratios=[0.5, 0.25], max_drop=0.8)
    def test_recall(kv_result):
        assert kv_result.kept.policy == "shotkv"

    def test_other():
        pass
"""
FOUR = [
    "test_recall[shotkv-0.5]",
    "test_recall[shotkv-0.25]",
    "test_recall[tova-0.5]",
    "test_recall[tova-0.25]",
]


def collected(suite, source: str, *args: str) -> list[str]:
    suite.pytester.makepyfile(source)
    result = suite("--collect-only", "-q", *args)
    return [line.partition("::")[2] for line in result.outlines if "::" in line]


def test_each_cell_is_an_item_that_pytest_can_select(suite):
    assert collected(suite, GRID) == [*FOUR, "test_other"]
    assert collected(suite, GRID, "-k", "shotkv") == FOUR[:2]
    assert collected(suite, GRID, "-k", "0.25 and not tova") == [FOUR[1]]
    assert collected(suite, GRID, "-m", "kv_sensitivity") == FOUR
    file = "test_each_cell_is_an_item_that_pytest_can_select.py"
    rest = collected(suite, GRID, f"--deselect={file}::test_recall[tova-0.5]")
    assert rest == [*FOUR[:2], FOUR[3], "test_other"]


def test_collecting_measures_nothing_and_loads_no_model(suite):
    suite.pytester.makepyfile(GRID)
    result = suite("--collect-only", "--kv-model=./none")
    assert result.ret == 0
    result.stdout.no_fnmatch_line("*sensitivity of*")


def test_what_failed_last_runs_alone_and_the_first_failure_can_end_the_run(suite):
    suite.pytester.makepyfile(GRID)
    suite("-x").assert_outcomes(passed=2, failed=1)
    suite().assert_outcomes(passed=3, failed=2)
    cells = suite.cells("--lf")
    assert [(cell["policy"], cell["ratio"]) for cell in cells] == [("tova", 0.5), ("tova", 0.25)]


def test_a_marker_counts_on_a_class_and_on_a_module(suite):
    in_class = """
        from pytest_kvguard import kv_sensitivity

        @kv_sensitivity("recall", ratios=[0.5, 0.25])
        class TestRecall:
            def test_one(self, kv_result): pass
            def test_two(self, kv_cell): pass
    """
    tests = ["test_one", "test_two"]
    cells = ["snapkv-0.5", "snapkv-0.25"]
    assert collected(suite, in_class) == [
        f"TestRecall::{name}[{cell}]" for name in tests for cell in cells
    ]
    in_module = """
        import pytest

        pytestmark = pytest.mark.kv_sensitivity("recall", policies="h2o", ratios=0.75)

        def test_recall(kv_result): pass

        @pytest.mark.kv_sensitivity("recall", policies=("tova",))
        def test_closer(kv_result): pass
    """
    assert collected(suite, in_module) == ["test_recall[h2o-0.75]", "test_closer[tova-0.5]"]


def test_a_marked_test_keeps_its_own_parameters(suite):
    source = """
        import pytest

        @pytest.mark.parametrize("floor", [0.1, 0.2])
        @pytest.mark.kv_sensitivity("recall")
        def test_recall(kv_result, floor): pass
    """
    names = ["test_recall[snapkv-0.5-0.1]", "test_recall[snapkv-0.5-0.2]"]
    assert sorted(collected(suite, source)) == names


@pytest.mark.parametrize(
    ("decorator", "arguments", "expected"),
    [
        ('("recall")', "", "is marked kv_sensitivity but asks for neither kv_result nor kv_cell"),
        ('("recall", ratio=1)', "kv_result", "unknown argument of kv_sensitivity 'ratio'; did you"),
        ("()", "kv_result", "kv_sensitivity takes one task, got 0 arguments"),
        ('("recall", "snapkv")', "kv_result", "kv_sensitivity takes one task, got 2 arguments"),
        ("(7)", "kv_result", "a task is a name or a Task, got 7"),
        ('("recal")', "kv_result", "unknown task 'recal'; did you mean 'recall'? known: "),
        ('("recall", policies="snap")', "kv_result", "unknown policy 'snap'; did you mean 'snapkv"),
        ('("recall", policies=[])', "kv_result", "kv_sensitivity was given no policies, so it wou"),
        ('("recall", policies=7)', "kv_result", "policies: a policy is named as text, such as 'sn"),
        (
            '("recall", policies=get_policy("tova"))',
            "kv_result",
            "policies: a policy is named as te"
            "xt, such as 'tova', got a Policy; register_policy gives a policy of your own a name",
        ),
        ('("recall", ratios=())', "kv_result", "kv_sensitivity was given no ratios, so it would"),
        (
            '("recall", ratios=[0.5, 0])',
            "kv_result",
            "ratios: keep ratio must be in (0, 1], got '0'",
        ),
        (
            '("recall", ratios=50)',
            "kv_result",
            "ratios: keep ratio must be in (0, 1], got '50'; did ",
        ),
        (
            '("recall", ratios="0.5,0.25")',
            "kv_result",
            "ratios: expected a number, got '0.5,0.25'; "
            "several are separated by commas on the command line, and a list in Python",
        ),
        ('("recall", ratios=True)', "kv_result", "ratios: expected a number, got 'True'"),
        ('("recall", ratios="most")', "kv_result", "ratios: expected a number, got 'most'"),
        ('("recall", max_drop=1)', "kv_result", "max_drop: max drop must be in [0, 1), got '1'"),
        (
            '("recall", max_drop=float("nan"))',
            "kv_result",
            "max_drop: expected a number, got 'nan'",
        ),
        (
            '("recall", limit=-1)',
            "kv_result",
            "limit: expected a whole number of at least 1, got '-",
        ),
        (
            '("recall", limit=2.0)',
            "kv_result",
            "limit: expected a whole number of at least 1, got ",
        ),
        (
            '("recall", units="shot")',
            "kv_result",
            "units: expected one of shots, sentences, paragrap"
            "hs, turns, code, json, got 'shot'; did you mean 'shots'?",
        ),
    ],
)
def test_a_marker_that_cannot_be_used_ends_the_run(suite, decorator, arguments, expected):
    suite.pytester.makepyfile(
        test_it=f"""
        import pytest
        from pytest_kvguard import get_policy

        @pytest.mark.kv_sensitivity{decorator}
        def test_x({arguments}): pass
        """
    )
    result = suite()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line.strip()]
    assert line.startswith(f"ERROR: test_it.py::test_x: {expected}")


def test_an_argument_that_is_none_is_not_given(suite):
    none = "policies=None, ratios=None, max_drop=None, limit=None, units=None"
    source = f"""
        import pytest

        @pytest.mark.kv_sensitivity("recall", {none})
        def test_recall(kv_result): pass
    """
    assert collected(suite, source) == ["test_recall[snapkv-0.5]"]


@pytest.mark.parametrize("fixture", ["kv_result", "kv_cell"])
def test_asking_for_a_cell_without_a_marker_ends_the_run(suite, fixture):
    suite.pytester.makepyfile(test_it=f"def test_x({fixture}): pass")
    result = suite()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: test_it.py::test_x: asks for kv_cell or kv_result but has no @kv_sensitivity(*"]
    )


def test_several_unusable_markers_are_counted(suite):
    suite.pytester.makepyfile("def test_x(kv_result): pass\ndef test_y(kv_cell): pass")
    suite().stderr.fnmatch_lines(["ERROR: *::test_x: * (and 1 more tests)"])


def test_the_marker_is_known_to_strict_runs_and_shown(suite):
    suite.pytester.makepyfile(GRID)
    suite("--strict-markers", "--collect-only").assert_outcomes()
    suite("--markers").stdout.fnmatch_lines(["@pytest.mark.kv_sensitivity(task, [*], policies=*"])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ('policy="tova", ratio=50', "InvalidArgument: ratios: keep ratio must be in (0, 1], got *"),
        ('policy="tova", ratio=[0.5]', "InvalidArgument: expected a number, got '[[]0.5]'"),
        (
            'policy=["tova"], ratio=0.5',
            "InvalidArgument: a policy is named as text, *, got a list*",
        ),
        ('policy="tov", ratio=0.5', "UnknownName: unknown policy 'tov'; did you mean 'tova'? *"),
        (
            'policy="tova", ratio=0.5, limit=0',
            "InvalidArgument: limit: expected a whole number of*",
        ),
    ],
)
def test_kvguard_names_what_it_cannot_use_and_shows_only_the_callers_line(suite, asked, expected):
    suite.pytester.makepyfile(f"def test_it(kvguard): kvguard('recall', {asked})")
    result = suite()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [">   def test_it(kvguard): *", f"E   pytest_kvguard.errors.{expected}", "*:1: *"]
    )
    assert "plugin.py" not in result.stdout.str()
