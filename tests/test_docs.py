"""The pages in docs/ that are written by a program say what the program says now."""

import runpy
from pathlib import Path

import pytest

from pytest_kvguard.policies import POLICIES
from pytest_kvguard.policies.base import Policy
from pytest_kvguard.policies.budgets import keep_ratio
from pytest_kvguard.policies.h2o import h2o
from pytest_kvguard.policies.modifiers import MODIFIERS
from pytest_kvguard.policies.pyramidkv import pyramidkv
from pytest_kvguard.policies.quest import quest
from pytest_kvguard.policies.selectors import top_tokens
from pytest_kvguard.policies.shotkv import shotkv
from pytest_kvguard.policies.snapkv import snapkv

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["policies", "formats"]


def written(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def program(page: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)  # as when it is run
        return runpy.run_path(str(DOCS / f"make_{page}.py"))


@pytest.fixture(scope="module")
def write():
    return program("policies")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_its_program_writes(page):
    assert program(page)["page"]() == written(page), f"run: python docs/make_{page}.py"


@pytest.mark.parametrize("name", [*POLICIES, *MODIFIERS])
def test_every_policy_modifier_and_format_has_a_row_a_source_and_a_section(name):
    lines = [line for page in PAGES for line in written(page).splitlines()]
    [row] = [line for line in lines if line.startswith(f"| [`{name}`](#")]
    anchor = row.partition("(#")[2].partition(")")[0]
    assert "](https://" in row
    assert any(line.lower().replace(" ", "-") == f"##-{anchor}" for line in lines)
    assert any(line.startswith(f"`{name}(") for line in lines)


def test_what_a_format_costs_is_what_its_engine_says():
    """Bytes a token of Llama-3-8B: by hand, from bytes of a block, a slot, a number."""
    shown = {
        row[1]: row for line in written("formats").splitlines() if (row := line.split("|"))[2:]
    }
    found = {
        name: [cell.strip() for cell in row[3:5]]
        for title, row in shown.items()
        for name in [title.partition("`")[2].partition("`")[0]]
    }
    heads, plain = 8, 8 * 2 * 2 * 128  # heads, bytes in bfloat16
    assert found["fp8_e4m3"] == ["8", f"{32 * heads * 256:,}"]
    assert found["q8_0"] == ["8.5", f"{32 * heads * 2 * 4 * 34:,}"]
    assert found["q4_0"] == ["4.5", f"{32 * heads * 2 * 4 * 18:,}"]
    assert found["nvfp4"] == ["4.5", f"{32 * heads * 2 * 8 * 9:,}"]
    assert found["mxfp4"] == ["4.25", f"{32 * heads * 2 * 4 * 17:,}"]
    slots = {"k8v4": 196, "4bit_nc": 134, "k3v4_nc": 118, "3bit_nc": 102}
    for preset, slot in slots.items():
        assert found[f"turboquant_{preset}"][1] == f"{28 * heads * slot + 4 * plain:,}"


def test_what_decides_is_found_by_trying(write):
    def importance(state):
        loud = state.values.norm(dim=-1)
        state.keys.norm()  # looked at, to no effect
        return loud.masked_fill(state.punctuation, 0)

    assert write["_looked_at"](Policy("x", importance, keep_ratio, top_tokens)) == (
        "values, punctuation"
    )


def test_the_words_of_the_table_are_those_of_the_papers(write):
    assert write["_looked_at"](snapkv(window=7)) == "last 7 queries, keys"
    assert write["_looked_at"](quest()) == "each query, keys"
    assert write["_heads"](snapkv()) == "own positions"
    assert write["_heads"](shotkv()) == "same positions"
    assert write["_layers"](pyramidkv()) == "fewer in deeper ones"
    assert write["_while_decoding"](snapkv()) == "none"
    assert write["_while_decoding"](shotkv()) == "generated"
    assert write["_while_decoding"](h2o()) == "any"
    assert write["_costs"](h2o()) == "sums, step by step"
    assert write["_modifier"]("fair", MODIFIERS["fair"]())[2:] == ("what is kept",)
