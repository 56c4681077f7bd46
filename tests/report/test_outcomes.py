"""Whatever a measurement comes to, every place that shows it shows it as it is."""

import json
import math
import re

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pytest_kvguard.errors import Refused
from pytest_kvguard.report.markdown import markdown
from pytest_kvguard.report.rows import HEADER
from pytest_kvguard.report.table import table
from tests.outcomes import comparisons, outcomes

PAGE = MarkdownIt("commonmark").enable(["table", "strikethrough"])


DRAWN = {
    "pass": lambda found: found.comparison and found.comparison.verdict == "pass",
    "fail": lambda found: found.comparison and found.comparison.verdict == "fail",
    "inconclusive": lambda found: found.comparison and found.comparison.verdict == "inconclusive",
    "refused": lambda found: found.comparison and found.comparison.refusal,
    "weak": lambda found: found.weakness and found.comparison and found.comparison.observed,
    "undefined": lambda found: found.weakness and found.comparison and not found.cell["base"],
    "given up": lambda found: found.comparison is None,
}


@pytest.mark.parametrize("kind", DRAWN)
def test_every_kind_of_outcome_is_among_those_drawn(kind):
    assert find(
        outcomes(), DRAWN[kind], settings=settings(max_examples=1000, phases=[Phase.generate])
    )


@given(c=comparisons())
def test_a_comparison_comes_to_a_verdict_and_says_why(c):
    known = c.observed is not None and c.refusal is None
    assert (c.observed_interval is not None) == known
    if not known:
        for ask in ("dp", "interval"):
            with pytest.raises(Refused):
                getattr(c, ask)
    else:
        low, high = c.interval
        assert low <= c.dp <= high or math.isclose(low, c.dp) or math.isclose(high, c.dp)
    if c.verdict == "inconclusive":
        assert c.holds == {"gate": c.dp >= -c.max_drop, "proved": False, "regression": True}[c.mode]
    else:
        assert c.holds == (c.verdict == "pass")
    if c.verdict == "refused":
        assert c.reason == (c.refusal or c.weakness)
        assert repr(c).endswith(f"refused: {c.reason}>")
    else:
        low, high = c.interval
        assert (c.verdict == "pass") == (low > -c.max_drop)
        assert (c.verdict == "fail") == (high < -c.max_drop)
        assert repr(c).endswith(f": {c.verdict}>")
        assert c.reason or c.verdict == "pass"


@given(found=outcomes())
def test_a_cell_is_json_and_says_what_the_comparison_says(found):
    cell, c = found.cell, found.comparison
    assert json.loads(json.dumps(cell, allow_nan=False)) == cell
    assert not cell["skipped"] or cell["verdict"] == "refused"
    if c is None:
        assert (cell["verdict"], cell["reason"]) == ("refused", found.weakness)
        assert (cell["kept"], cell["dp"], cell["interval"]) == (None, None, [None, None])
        return
    assert cell["verdict"] == c.verdict
    assert cell["skipped"] == (c.weakness is not None and c.mode != "proved")
    assert cell["reason"] == c.reason
    assert cell["dp"] == finite(c.observed)
    assert cell["interval"] == [finite(end) for end in c.observed_interval or (None, None)]
    assert cell["base"] == finite(c.base.mean)


def finite(value):
    return value if value is not None and math.isfinite(value) else None


def shown(cell) -> list[str]:
    """What a row says, worked out here anew from the cell; None for a name."""
    low, high = cell["interval"]
    ends = ("-inf%" if low is None else percent(low), "+inf%" if high is None else percent(high))
    return [
        f"{cell['ratio']:g}",
        str(cell["n"]),
        *(f"{mean:.3f}" for mean in (cell["base"], cell["kept"]) if mean is not None),
        *([percent(cell["dp"])] if cell["dp"] is not None else []),
        *([f"[{', '.join(ends)}]"] if cell["interval"] != [None, None] else []),
        *([f"{len(cell['broke'])}/{len(cell['mended'])}"] if cell["kept"] is not None else []),
        "skipped" if cell["skipped"] else cell["verdict"].replace("fail", "FAIL"),
    ]


def percent(change: float) -> str:
    return f"{100 * change:+z.1f}%"


def without_space(text: str) -> str:
    return "".join(printed(text).split())


def printed(text: str) -> str:
    """What may be printed of a text, the rest escaped."""
    return " ".join(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in word)
        for word in text.split()
    )


@given(found=st.lists(outcomes(), min_size=1, max_size=4), width=st.sampled_from([40, 80, 120]))
def test_the_table_shows_every_number_every_verdict_and_every_reason(found, width):
    cells = [outcome.cell for outcome in found]
    lines = table(cells, width=width)
    assert all(line.isprintable() for line in lines)
    legend = next(i for i, line in enumerate(lines) if line.startswith("dP: relative"))
    body = [" ".join(line.split()) for line in lines[:legend]]
    for cell in cells:
        row = r"(\?|\d+%( bytes| read)?)".join(  # the share held comes after the ratio
            re.escape(part) for part in (shown(cell)[0] + " ", " " + " ".join(shown(cell)[1:]))
        )
        assert any(re.search(row, line) for line in body)
        assert without_space(cell["reason"]) in "".join("".join(lines).split())
    tally = " ".join(" ".join(lines[-3:]).split())
    for verdict in {shown(cell)[-1] for cell in cells}:
        assert f"{sum(shown(cell)[-1] == verdict for cell in cells)} {verdict}" in tally


@given(found=st.lists(outcomes(), min_size=1, max_size=4))
def test_markdown_reads_as_the_table_does(found):
    cells = [outcome.cell for outcome in found]
    tokens = PAGE.parse(markdown(cells, model=cells[0]["model"]))
    kinds = [token.type for token in tokens if token.nesting == 1]
    explained = [cell for cell in cells if cell["reason"]]
    assert kinds.count("table_open") == 1
    assert kinds.count("tr_open") == 1 + len(cells)
    assert kinds.count("td_open") == len(cells) * len(HEADER)
    assert kinds.count("bullet_list_open") == bool(explained)
    assert kinds.count("heading_open") == 1
    assert not {"ordered_list_open", "blockquote_open"} & set(kinds)
    texts = [plain(token) for token in tokens if token.type == "inline"]
    assert texts[0].split() == f"KV-cache compression: {printed(cells[0]['model'])}".split()
    body = texts[2 + len(HEADER) :]
    for number, cell in enumerate(cells):
        row = body[number * len(HEADER) : (number + 1) * len(HEADER)]
        assert row[0].startswith(printed(cell["task"]))
        assert row[1].startswith(printed(cell["spec"]))
        assert [text for text in (row[2], *row[4:]) if text] == shown(cell)
    for cell in explained:
        assert any(without_space(cell["reason"]) in without_space(text) for text in body)


def plain(token) -> str:
    """The text of a paragraph, of which nothing may be read as anything but text."""
    inner = [child for child in token.children if child.content != "<sub>" != child.content]
    kinds = {child.type for child in token.children}
    assert kinds <= {"text", "text_special", "strong_open", "strong_close", "html_inline"}, kinds
    return "".join(child.content for child in inner)
