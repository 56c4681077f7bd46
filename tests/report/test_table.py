import re

import pytest

from pytest_kvguard.report.table import table

CODES = re.compile(r"\x1b\[[0-9;]*m")


def test_each_cell_is_a_row_with_its_numbers(cells):
    lines = table(cells)
    assert " ".join(lines[0].split()) == (
        "task policy ratio held n base kept dP interval -/+ verdict"
    )
    rows = [" ".join(line.split()) for line in lines]
    for row in (
        "retrieval snapkv 0.25 24% 50 0.960 0.940 -2.1% [-8.8%, +3.6%] 1/0 pass",
        "long_generation streaming_llm 0.25 24% 50 0.960 0.400 -58.3% [-69.3%, -46.5%] 28/0 FAIL",
        "retrieval snapkv 1 ? 50 0.960 0.940 1/0 refused",
    ):
        assert row in rows


def test_a_storage_shows_its_bytes_where_there_are_any(cells):
    lines = table([cells[0] | {"saves": "bytes"}, cells[2] | {"saves": "bytes", "bytes_full": 0}])
    assert "25% bytes" in lines[2]
    assert " 1         ? 50 " in lines[3]


def test_the_last_line_counts_the_verdicts(cells):
    assert table(cells)[-1] == (
        "1 pass, 1 inconclusive (about 140 samples would decide), 1 refused, 1 FAIL"
    )
    assert table(cells[:1])[-1] == "1 pass"


def test_the_most_that_any_inconclusive_cell_needs_is_named(cells):
    more = cells[1] | {"samples_needed": 900}
    assert table([more, cells[1]])[-1] == "2 inconclusive (about 900 samples would decide)"


def test_reasons_follow_the_table_the_fails_first(cells):
    text = "\n".join(table(cells, width=200))
    found = [
        text.index(reason)
        for reason in (
            "long_generation streaming_llm@0.25: FAIL: 28 broke, 0 mended",
            "retrieval snapkv@1: refused: nothing was evicted",
            "world_knowledge snapkv(window=16, kernel=5)@0.5: inconclusive: n = 50 cannot decide",
        )
    ]
    assert found == sorted(found)
    assert "pass:" not in text


def test_a_pass_with_something_odd_about_it_is_explained(cells):
    lines = table([cells[0] | {"reason": "better than the full cache"}])
    assert "retrieval snapkv@0.25: pass: better than the full cache" in lines


def test_the_legend_explains_the_columns_the_level_and_the_limit(cells):
    text = " ".join(table(cells))
    assert "dP: relative change of the mean score (limit -10.0%), worse is negative" in text
    assert "interval: where the true dP lies (90%, paired by sample)" in text
    assert "held: share of the prompt" in text
    shared = " ".join(table([*cells, cells[0] | {"clusters": 10}]))
    assert "(90%, paired by sample, clustered by context)" in shared
    assert "-/+: samples that broke/mended" in text


@pytest.mark.parametrize(
    ("saves", "words"),
    [
        ("bytes", "left in the cache, or of its bytes; -/+"),
        ("reads", "left in the cache, or of it what a step reads; -/+"),
        ("positions", "left in the cache; -/+"),
    ],
)
def test_the_legend_says_of_what_the_shares_are(cells, saves, words):
    assert words in " ".join(table([cells[0], cells[0] | {"saves": saves}]))


@pytest.mark.parametrize("other", [0.05, 0.1001])
def test_different_limits_are_not_called_one(cells, other):
    text = " ".join(table([cells[0], cells[1] | {"max_drop": other}]))
    assert "limit" not in text


@pytest.mark.parametrize(("other", "said"), [(0.9, "(90%, paired"), (0.905, "(paired")])
def test_different_levels_are_not_called_one(cells, other, said):
    assert said in " ".join(table([cells[0], cells[1] | {"level": other}]))


def test_a_level_is_not_rounded(cells):
    assert "(97.5%, paired" in " ".join(table([cells[0] | {"level": 0.975}]))


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("color", [False, True], ids=["piped", "in colour"])
def test_lines_stay_within_the_width(cells, monkeypatch, width, color):
    monkeypatch.delenv("NO_COLOR", raising=False)
    largest = {
        "ratio": 0.125,
        "n": 1000,
        "dp": -1.0,
        "interval": [-1.0, -0.998],
        "broke": ["s"] * 1000,
        "saves": "bytes",
        "verdict": "inconclusive",
        "spec": "shotkv+h2o@0.5|kivi(bits=4, group=32, residual=64)|whitelist(kinds='system')",
        "reason": "long_words " * 60,
    }
    lines = [
        CODES.sub("", line)
        for line in table([*cells, cells[0] | largest], width=width, color=color)
    ]
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [20, 60, 80, 100, 120, 140, 200])
def test_numbers_are_never_cut(cells, width):
    lines = table(cells, width=width)
    row = r"^.* 0\.25  24% 50 0\.960 0\.400 -58\.3% \[-69\.3%, -46\.5%\] 28/0 FAIL$"
    assert sum(bool(re.match(row, line)) for line in lines) == 1


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("color", [False, True], ids=["piped", "in colour"])
def test_the_name_of_an_ability_has_a_line_of_its_own(cells, width, color):
    groups = [cells[0] | {"ability": "world knowledge", "task": "q"}, *cells]
    lines = [CODES.sub("", line) for line in table(groups, width=width, color=color)]
    assert lines.count("WORLD KNOWLEDGE") == lines.count("RETRIEVAL") == 1


def test_where_a_row_does_not_fit_its_names_stand_above_its_numbers(cell):
    halved = cell | {"ratio": 0.5, "saves": "bytes", "verdict": "inconclusive"}
    other = cell | {"ability": "long generation"}
    named = cell | {"task": "world_knowledge", "spec": "snapkv(window=16, kernel=5)"}
    lines = table([cell, halved, other, named], width=80)
    assert lines[: lines.index("")] == [
        "task  policy",
        "  ratio      held  n  base  kept    dP       interval -/+ verdict",
        "RETRIEVAL",
        "retrieval  snapkv",
        "   0.25       24% 50 0.960 0.940 -2.1% [-8.8%, +3.6%] 1/0 pass",
        "    0.5 25% bytes 50 0.960 0.940 -2.1% [-8.8%, +3.6%] 1/0 inconclusive",
        "world_knowledge  snapkv(window=16, kernel=5)",
        "   0.25       24% 50 0.960 0.940 -2.1% [-8.8%, +3.6%] 1/0 pass",
        "LONG GENERATION",
        "retrieval  snapkv",
        "   0.25       24% 50 0.960 0.940 -2.1% [-8.8%, +3.6%] 1/0 pass",
    ]


def test_where_rows_fit_the_names_have_columns(cell):
    lines = table([cell, cell | {"task": "facts"}], width=80)
    assert lines[: lines.index("")] == [
        "task      policy ratio held  n  base  kept    dP       interval -/+ verdict",
        "RETRIEVAL",
        "retrieval snapkv  0.25  24% 50 0.960 0.940 -2.1% [-8.8%, +3.6%] 1/0 pass",
        "facts     snapkv  0.25  24% 50 0.960 0.940 -2.1% [-8.8%, +3.6%] 1/0 pass",
    ]


def test_a_long_name_is_folded_not_cut(cells):
    lines = table(cells[1:2], width=100)
    folded = [line[:15].strip() for line in lines[2 : lines.index("")]]
    assert " ".join(folded).startswith("world_knowledge (context)")


def test_the_longer_name_gives_way(cell):
    long = cell | {"task": "t" * 40}
    lines = table([long], width=100)
    assert "snapkv" in lines[2]
    lines = table([long | {"task": "facts", "spec": "p" * 40}], width=100)
    assert "facts" in lines[2]


def test_names_of_wide_letters_keep_the_columns(cell):
    lines = table([cell, cell | {"task": "検索"}], width=100)
    assert lines[2].index("snapkv") == lines[3].index("snapkv") + 2  # two columns each


def test_what_cannot_be_printed_is_shown_escaped_and_on_one_line(cell):
    odd = {"task": "a\nb\x1b[2J", "spec": "p\u202eq", "ability": "x\ty", "reason": "no\r\nroom\0"}
    lines = table([cell | odd], width=140)
    assert lines[1] == "X Y"
    assert lines[2].startswith("a b\\x1b[2J p\\u202eq  0.25")
    assert "a b\\x1b[2J p\\u202eq@0.25: pass: no room\\x00" in lines


def test_square_brackets_in_a_name_are_shown(cells):
    assert "[red]task" in "\n".join(table([cells[0] | {"task": "[red]task"}]))


def test_the_protocol_is_shown_where_it_is_not_the_whole_prompt(cells):
    assert "world_knowledge (context) " in "\n".join(table(cells, width=140))


@pytest.mark.parametrize(
    ("interval", "shown"),
    [([-1.0, None], "[-100.0%, +inf%]"), ([None, 1.0], "[-inf%, +100.0%]")],
)
def test_an_unbounded_interval_is_shown_as_such(cells, interval, shown):
    assert shown in "\n".join(table([cells[0] | {"interval": interval}]))


def test_a_cell_that_was_not_run_shows_no_numbers_of_it(cells):
    blank = {"kept": None, "dp": None, "interval": [None, None], "held": None, "broke": []}
    lines = table([cells[0] | blank | {"verdict": "refused", "skipped": True}])
    assert lines[2].split() == ["retrieval", "snapkv", "0.25", "?", "50", "0.960", "skipped"]


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_there_are_no_colour_codes_unless_asked_for(cells, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert "\x1b" not in "\n".join(table(cells))


def test_colours_tell_the_verdicts_apart(cells, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = "\n".join(table(cells, color=True))
    assert "\x1b[32mpass" in text
    assert "\x1b[1;31mFAIL" in text


def test_no_cells_make_no_table():
    assert table([]) == []


def test_a_reason_that_cells_share_is_given_once(cells):
    weak = {"verdict": "refused", "reason": "the baseline is too weak"}
    text = " ".join(table([cells[0] | weak, cells[0] | weak | {"ratio": 0.5}, cells[3]]))
    assert text.count("the baseline is too weak") == 1
    assert "retrieval snapkv@0.25, snapkv@0.5: refused: the baseline is too weak" in text


def test_a_task_beyond_the_model_is_counted_as_skipped_not_as_refused(cells):
    beyond = cells[0] | {"verdict": "refused", "skipped": True, "reason": "too weak"}
    lines = table([beyond, cells[0]])
    assert lines[-1] == "1 pass, 1 skipped"
    assert any(line.startswith("retrieval snapkv@0.25: skipped: too weak") for line in lines)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([], "1 skipped: nothing was proved"),
        ([{"verdict": "refused"}], "1 skipped, 1 refused: nothing was proved"),
        ([{"verdict": "inconclusive"}], "1 inconclusive, 1 skipped"),
    ],
)
def test_a_run_that_proved_nothing_says_so(cells, others, said):
    beyond = cells[0] | {"verdict": "refused", "skipped": True}
    assert table([beyond, *(cells[0] | other for other in others)])[-1] == said


def test_tasks_of_an_ability_stand_together_under_its_name(cells):
    mixed = [cells[0], cells[0] | {"ability": "reasoning", "task": "sums"}, cells[0]]
    first_words = [line.split()[0] for line in table(mixed)[1:6]]
    assert first_words == ["RETRIEVAL", "retrieval", "retrieval", "REASONING", "sums"]


def test_units_are_shown_where_they_are_not_those_the_task_marks(cells):
    shots, sentences = (cells[0] | {"spec": "shotkv", "units": u} for u in ("shots", "sentences"))
    lines = table([shots, sentences | {"reason": "odd"}], width=140)
    assert [line.split("0.25")[0].split() for line in lines[2:4]] == [
        ["retrieval", "shotkv"],
        ["retrieval", "shotkv", "(sentences)"],
    ]
    assert "retrieval shotkv (sentences)@0.25: pass: odd" in lines
