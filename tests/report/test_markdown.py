import pytest

from pytest_kvguard.report.markdown import markdown


def test_each_cell_is_a_row_of_a_markdown_table(cells):
    lines = markdown(cells, model="tiny").splitlines()
    header = lines.index(
        "| task | policy | ratio | held | n | base | kept | dP | interval | -/+ | verdict |"
    )
    assert lines[header + 1] == (
        "| :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: | :-- |"
    )
    assert lines[header + 2] == (
        r"| retrieval | snapkv | 0.25 | 24% | 50 | 0.960 | 0.940 | -2.1% | \[-8.8%, +3.6%] "
        "| 1/0 | pass |"
    )
    assert lines[header + 6] == ""  # four cells


def test_the_heading_names_the_model_and_the_tally_comes_first(cells):
    lines = markdown(cells, model="hub/tiny").splitlines()
    assert lines[0] == "### KV-cache compression: hub/tiny"
    assert lines[2] == (
        "**1 pass, 1 inconclusive (about 140 samples would decide), 1 refused, 1 FAIL**"
    )


def test_reasons_are_a_list_below_the_table(cells):
    lines = markdown(cells, model="tiny").splitlines()
    assert r"- long\_generation streaming\_llm@0.25: FAIL: 28 broke, 0 mended" in lines
    assert "- retrieval snapkv@1: refused: nothing was evicted" in lines


def test_text_cannot_break_the_table(cells):
    text = markdown([cells[3] | {"task": "a|b\n<i>", "reason": "`x` *y*"}], model="m_1")
    assert "### KV-cache compression: m\\_1\n" in text
    assert "| a\\|b \\<i> |" in text
    assert r"\`x\` \*y\*" in text


def test_no_cells_make_no_summary():
    assert markdown([], model="tiny") == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("a\nb", "a b"),
        ("`a`", r"\`a\`"),
        ("<b>&lt;", r"\<b>\&lt;"),
        ("~~a~~ $x$ #1", r"\~\~a\~\~ \$x\$ \#1"),
        ("![a](b)", r"!\[a](b)"),
        ("a\\", r"a\\"),
        ("\x1b[2J\0", r"\\x1b\[2J\\x00"),
    ],
)
def test_names_and_reasons_are_shown_as_they_are(cells, text, shown):
    page = markdown([cells[3] | {"task": text, "spec": text, "reason": text}], model=text)
    assert f"### KV-cache compression: {shown}\n" in page
    assert f"| {shown} | {shown} | 0.25 |" in page
    assert f"- {shown} {shown}@0.25: FAIL: {shown}\n" in page


@pytest.mark.parametrize(
    ("task", "shown"), [("- a", r"\- a"), ("+", r"\+"), ("> a", r"\> a"), ("12) a", r"12\) a")]
)
def test_a_reason_begins_no_list_of_its_own(cells, task, shown):
    page = markdown([cells[3] | {"task": task}], model="tiny")
    assert f"- {shown} streaming" in page


@pytest.mark.parametrize("complete", [True, False])
def test_a_run_that_ended_early_is_told(cells, complete):
    page = markdown(cells, model="tiny", complete=complete)
    assert ("FAIL** The run ended early: cells may be missing.\n" in page) is not complete
