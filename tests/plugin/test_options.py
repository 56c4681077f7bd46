import pytest

from pytest_kvguard import values
from pytest_kvguard.harness.encode import PROTECTABLE
from pytest_kvguard.models import DTYPES
from pytest_kvguard.options import OPTIONS, PARTS

MARKED = """
    from pytest_kvguard import kv_sensitivity

    @kv_sensitivity("recall", policies="shotkv", ratios=0.5)
    def test_recall(kv_result):
        assert kv_result.holds
"""
NAMES = ["--collect-only", "-q"]
LONG = "a" * 300


def items(result: pytest.RunResult) -> list[str]:
    return [line.partition("::")[2] for line in result.outlines if "::" in line]


def sentence(result: pytest.RunResult) -> str:
    """The one line that a run was ended with."""
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line.strip()]
    return line


def test_help_names_every_option_with_its_metavar_and_default(suite):
    text = suite("--help").stdout.str()
    shown = " ".join(text.split())
    for option in OPTIONS:
        assert f"{option.flag}={option.metavar} " in shown
        assert " ".join(option.help.split()) in shown
        assert "Default: " in option.help
        assert f"  {option.ini} (" in text  # the ini twin


def test_every_option_is_one_of_ours_by_its_name():
    assert {option.flag for option in OPTIONS if not option.flag.startswith("--kv-")} == {"--ratio"}


def test_the_parts_and_types_on_offer_are_those_that_can_be_used():
    assert PARTS == PROTECTABLE
    for name in ("auto", *DTYPES):
        assert next(o for o in OPTIONS if o.flag == "--kv-dtype").read(name) == name


def test_the_command_line_wins_over_the_ini_file_and_that_over_the_marker(suite):
    suite.pytester.makepyfile(MARKED)
    assert items(suite(*NAMES)) == ["test_recall[shotkv-0.5]"]
    suite.pytester.makeini(
        """
        [pytest]
        kv_policy = snapkv(window=4), h2o
        ratio = 0.25
        """
    )
    from_ini = ["test_recall[snapkv(window=4)-0.25]", "test_recall[h2o-0.25]"]
    assert items(suite(*NAMES)) == from_ini
    assert items(suite(*NAMES, "--kv-policy=tova")) == ["test_recall[tova-0.25]"]
    assert items(suite(*NAMES, "--kv-policy=tova", "--ratio=0.75")) == ["test_recall[tova-0.75]"]


def test_lists_are_separated_by_commas_or_repeated_and_said_twice_count_once(suite):
    suite.pytester.makepyfile(MARKED)
    given = ["--kv-policy=tova,snapkv(window=4, kernel=3)", "--kv-policy=tova", "--ratio=.5,0.50"]
    assert items(suite(*NAMES, *given)) == [
        "test_recall[tova-0.5]",
        "test_recall[snapkv(window=4, kernel=3)-0.5]",
    ]


def test_policies_are_put_together_on_the_command_line_in_the_ini_file_and_in_markers(suite):
    suite.pytester.makepyfile(MARKED.replace('"shotkv"', '["shotkv+h2o@0.5", "tova|kivi(bits=4)"]'))
    marked = ["test_recall[shotkv+h2o@0.5-0.5]", "test_recall[tova|kivi(bits=4)-0.5]"]
    assert items(suite(*NAMES)) == marked
    suite.pytester.makeini("[pytest]\nkv_policy = snapkv(window=4)+tova, shotkv+scope|rerotated\n")
    from_ini = ["test_recall[snapkv(window=4)+tova-0.5]", "test_recall[shotkv+scope|rerotated-0.5]"]
    assert items(suite(*NAMES)) == from_ini
    given = "--kv-policy=shotkv + h2o @ .25,kivi(bits=4)"
    assert items(suite(*NAMES, given)) == [
        "test_recall[shotkv+h2o@0.25-0.5]",
        "test_recall[kivi(bits=4)-0.5]",
    ]


def test_a_policy_put_together_is_measured_and_reported_as_it_was_typed(suite):
    suite.pytester.makepyfile(MARKED)
    (cell,) = suite.cells("--kv-policy=shotkv(window=4)+h2o(heavy=0.25)@0.5")
    assert cell["spec"] == "shotkv(window=4)+h2o(heavy=0.25)@0.5"
    assert cell["policy"] == "shotkv+h2o"
    assert cell["params"]["decode_heavy"] == 0.25
    assert cell["params"]["decode_ratio"] == 0.5


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--ratio=0", "--ratio: keep ratio must be in (0, 1], got '0'; 0.25 keeps a quarter"),
        ("--ratio=1.5", "--ratio: keep ratio must be in (0, 1], got '1.5'"),
        ("--ratio=0.5,-1", "--ratio: keep ratio must be in (0, 1], got '-1'"),
        ("--ratio=nan", "--ratio: expected a number, got 'nan'"),
        (
            "--ratio=0,25",
            "--ratio: keep ratio must be in (0, 1], got '0'; 0.25 keeps a quarter of "
            "the prompt; did you mean 0.25? a comma separates values",
        ),
        (
            "--ratio=0.5,0,25",
            "--ratio: keep ratio must be in (0, 1], got '0'; 0.25 keeps a quarter "
            "of the prompt; did you mean 0.25? a comma separates values",
        ),
        ("--ratio=25", "--ratio: keep ratio must be in (0, 1], got '25'; did you mean 0.25? it is"),
        ("--ratio=25%", "--ratio: expected a number, got '25%'; write 0.25"),
        ("--ratio=1/4", "--ratio: expected a number, got '1/4'; write 0.25"),
        (
            "--ratio=0.5 0.25",
            "--ratio: expected a number, got '0.5 0.25'; several are separated by",
        ),
        ("--ratio=inf", "--ratio: keep ratio must be in (0, 1], got 'inf'"),
        ("--ratio=half", "--ratio: expected a number, got 'half'"),
        ("--ratio=", "--ratio: expected at least one RATIO, got ''"),
        ("--kv-policy=,", "--kv-policy: expected at least one POLICY, got ','"),
        ("--kv-policy=snap-kv", "--kv-policy: cannot read 'snap-kv'; write name or name(key=valu"),
        ("--kv-policy=h2o@0.5", "--kv-policy: cannot read 'h2o@0.5'; write name or name(key=value"),
        (
            "--kv-policy=shotkv+h2o@0,5",
            "--kv-policy: cannot read '5'; write name or name(key=value, "
            "...), put together as prefill+decode@0.5|modifier; did you mean 0.5? a comma",
        ),
        (
            "--kv-task=recall(n=4),recall(right=0.5)",
            "--kv-task: recall is there twice, as recall("
            "n=4) and recall(right=0.5); give it once, with all parameters",
        ),
        ("--kv-task=facts+h2o", "--kv-task: cannot read 'facts+h2o'; write name or name(key=valu"),
        ("--kv-task=retrieval(800)", "--kv-task: cannot read 'retrieval(800)'; write name or"),
        ("--kv-limit=0", "--kv-limit: expected a whole number of at least 1, got '0'"),
        ("--kv-limit=2.5", "--kv-limit: expected a whole number of at least 1, got '2.5'"),
        ("--kv-limit=-3", "--kv-limit: expected a whole number of at least 1, got '-3'"),
        ("--kv-limit=all", "--kv-limit: expected a whole number of at least 1, got 'all'"),
        (f"--kv-limit={'9' * 5000}", "--kv-limit: expected a whole number of at least 1, got '99"),
        ("--kv-max-drop=1", "--kv-max-drop: max drop must be in [0, 1), got '1'; 0.1 allows a"),
        (
            "--kv-max-drop=10",
            "--kv-max-drop: max drop must be in [0, 1), got '10'; did you mean 0.1",
        ),
        (
            "--kv-max-drop=0,1",
            "--kv-max-drop: expected a number, got '0,1'; write 0.1, with a deci",
        ),
        ("--kv-max-drop=nan", "--kv-max-drop: expected a number, got 'nan'"),
        ("--kv-max-drop=", "--kv-max-drop: expected a number, got ''"),
        ("--kv-max-drop=-0.1", "--kv-max-drop: max drop must be in [0, 1), got '-0.1'"),
        ("--kv-mode=strict", "--kv-mode: expected one of gate, proved, regression, got 'strict'"),
        (
            "--kv-mode=Gate",
            "--kv-mode: expected one of gate, proved, regression, got 'Gate'; did yo",
        ),
        ("--kv-protocol=both", "--kv-protocol: expected one of prompt, context, got 'both'"),
        ("--kv-protect=shots", "--kv-protect: expected one of system, instruction, shot, document"),
        (
            "--kv-protect=question,sistem",
            "--kv-protect: expected one of system, instruction, shot, d"
            "ocument, question, template, got 'sistem'; did you mean 'system'?",
        ),
        ("--kv-units=lines", "--kv-units: expected one of shots, sentences, paragraphs, turns, co"),
        ("--kv-report=", "--kv-report: expected a file, got ''"),
        ("--kv-report=.", "--kv-report: expected a file, got '.'"),
        ("--kv-report=../", "--kv-report: cannot write '../': it is a folder; name a file in a"),
        ("--kv-report=/dev/null", "--kv-report: cannot write '/dev/null': it is no regular file;"),
        ("--kv-report=recall.py/a/kv.json", "--kv-report: cannot write 'recall.py/a/kv.json': Not"),
        (f"--kv-report={LONG}", f"--kv-report: cannot write '{LONG}': File name too long; name"),
        ("--kv-report=/proc/kv.json", "--kv-report: cannot write '/proc/kv.json': "),
        ("--kv-model=", "--kv-model: expected the name of a model, got ''"),
        (
            "--kv-device=gpu",
            "--kv-device: expected auto, cpu, cuda or cuda:N, got 'gpu'; did you mean 'cuda'?",
        ),
        (
            "--kv-device=1",
            "--kv-device: expected auto, cpu, cuda or cuda:N, got '1'; did you mean 'cuda:1'?",
        ),
        ("--kv-device=cuda:-1", "--kv-device: expected auto, cpu, cuda or cuda:N, got 'cuda:-1'"),
        ("--kv-device=", "--kv-device: expected auto, cpu, cuda or cuda:N, got ''"),
        (
            "--kv-dtype=int8",
            "--kv-dtype: expected one of auto, float32, bfloat16, float16, got 'int",
        ),
        (
            "--kv-dtype=fp16",
            "--kv-dtype: expected one of auto, float32, bfloat16, float16, got 'fp1"
            "6'; did you mean 'float16'?",
        ),
        (
            "--kv-memory=1",
            "--kv-memory: expected at least 1MiB (1048576 bytes), got '1'; a plain nu"
            "mber counts bytes, did you mean 1GiB?",
        ),
        (
            "--kv-memory=many",
            "--kv-memory: expected a size such as 500MB, 4GiB or a number of bytes",
        ),
        (
            "--kv-memory=4G",
            "--kv-memory: expected a size such as 500MB, 4GiB or a number of bytes, "
            "got '4G'; write 4GB or 4GiB",
        ),
        (
            "--kv-memory=4 apples",
            "--kv-memory: expected a size such as 500MB, 4GiB or a number of b",
        ),
        (
            "--kv-memory=-1GB",
            "--kv-memory: expected at least 1MiB (1048576 bytes), got '-1GB'; writ",
        ),
        (
            "--kv-memory=0",
            "--kv-memory: expected at least 1MiB (1048576 bytes), got '0'; write a si",
        ),
        (
            "--kv-memory=infMB",
            "--kv-memory: expected a size such as 500MB, 4GiB or a number of byte",
        ),
        (
            "--kv-memory=1e999GB",
            "--kv-memory: expected at least 1MiB (1048576 bytes), got '1e999GB'",
        ),
        (
            "--kv-memory=",
            "--kv-memory: expected a size such as 500MB, 4GiB or a number of bytes, go",
        ),
    ],
)
def test_a_bad_value_ends_the_run_in_one_line(suite, given, expected):
    suite.pytester.makepyfile(MARKED)
    assert sentence(suite(given)).startswith(f"ERROR: {expected}")


def test_a_limit_of_nothing_from_the_command_line_is_one(suite):
    suite.pytester.makepyfile(MARKED)
    (cell,) = suite.cells("--kv-max-drop=0", "--kv-limit=6")
    assert cell["max_drop"] == 0


def test_the_protocol_is_chosen_for_all(suite):
    suite.pytester.makepyfile(MARKED)
    (cell,) = suite.cells("--kv-protocol=context", "--kv-limit=6")
    assert cell["protocol"] == "context"


def test_a_bad_value_in_the_ini_file_is_said_to_be_there(suite):
    suite.pytester.makeini("[pytest]\nratio = 1.5\n")
    assert sentence(suite()).startswith("ERROR: ini value ratio: keep ratio must be in (0, 1]")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--kv-policy=snap", "unknown policy 'snap'; did you mean 'snapkv'? known: ad"),
        ("--kv-policy=snapkv(windw=4)", "unknown parameter of snapkv 'windw'; did you mean 'win"),
        ("--kv-policy=snapkv(window=0)", "window must be a whole number of at least 1, got 0"),
        ("--kv-policy=shotkv+knorm", "shotkv+knorm: knorm keeps every generated token, so there"),
        ("--kv-policy=shotkv|h2o", "unknown modifier 'h2o'; "),
        ("--kv-task=recal(n=4)", "unknown task 'recal'; did you mean 'recall'? known: arith"),
        ("--kv-task=recall(m=4)", "unknown parameter of recall 'm'; known: n, right"),
    ],
)
def test_an_unknown_name_ends_the_run_before_anything_is_measured(suite, given, expected):
    suite.pytester.makepyfile(test_it=MARKED)
    assert sentence(suite(given)).startswith(f"ERROR: test_it.py::test_recall: {expected}")


def test_parameters_for_a_task_go_on_top_of_the_markers(suite):
    suite.pytester.makepyfile(MARKED.replace('"recall"', '"recall(n=4, right=0.5)"'))
    (cell,) = suite.cells("--kv-task=recall(n=20)")
    assert (cell["n"], cell["base"]) == (20, 0.5)


def test_a_limit_on_memory_changes_no_number(suite, monkeypatch):
    monkeypatch.setattr(values, "LEAST_MEMORY", 1)  # a tiny model needs a tiny limit
    suite.pytester.makepyfile(MARKED)
    (roomy,), (tight,) = suite.cells(), suite.cells("--kv-memory=1MiB")
    for field in ("base", "kept", "broke", "held", "bytes_held"):
        assert roomy[field] == tight[field]


def test_protected_parts_stay_in_the_cache_and_a_ratio_that_cannot_hold_them_is_refused(suite):
    suite.pytester.makepyfile(MARKED)
    (held,) = suite.cells("--kv-protect=question,template", "--kv-policy=tova")
    assert held["held"]["max"] <= 0.5
    (refused,) = suite.cells("--kv-protect=question,shot", "--kv-policy=tova")
    assert refused["verdict"] == "refused"
    assert "keep ratio 0.5 of 35 positions is 17, but 34 are protected" in refused["reason"]
