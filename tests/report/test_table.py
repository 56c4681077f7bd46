import re

import pytest

from pytest_kvguard.report.table import table


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
    assert "25% of bytes" in lines[2]
    assert " 1            ? 50 " in lines[3]


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


def test_different_limits_are_not_called_one(cells):
    text = " ".join(table([cells[0], cells[1] | {"max_drop": 0.05}]))
    assert "limit" not in text


@pytest.mark.parametrize("width", [100, 140])
def test_lines_stay_within_the_width(cells, width):
    assert max(map(len, table(cells, width=width))) <= width


@pytest.mark.parametrize("width", [20, 60, 100, 140])
def test_numbers_are_never_cut(cells, width):
    lines = table(cells, width=width)
    row = r"^\S.* 0\.25  24% 50 0\.960 0\.400 -58\.3% \[-69\.3%, -46\.5%\] 28/0 FAIL$"
    assert sum(bool(re.match(row, line)) for line in lines) == 1


def test_a_long_name_is_folded_not_cut(cells):
    lines = table(cells[1:2], width=60)
    folded = [line[:15].strip() for line in lines[2 : lines.index("")]]
    assert " ".join(folded).startswith("world_knowledge (context)")


def test_square_brackets_in_a_name_are_shown(cells):
    assert "[red]task" in "\n".join(table([cells[0] | {"task": "[red]task"}]))


def test_the_protocol_is_shown_where_it_is_not_the_whole_prompt(cells):
    assert "world_knowledge (context) " in "\n".join(table(cells, width=140))


def test_an_unbounded_interval_is_shown_as_such(cells):
    assert "[-100.0%, +inf%]" in "\n".join(table([cells[0] | {"interval": [-1.0, None]}]))


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
