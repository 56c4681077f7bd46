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
PAGE = (DOCS / "policies.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def write():
    return runpy.run_path(str(DOCS / "make_policies.py"))


def test_the_page_of_the_policies_is_what_its_program_writes(write):
    assert write["page"]() == PAGE, "run: python docs/make_policies.py"


@pytest.mark.parametrize("name", [*POLICIES, *MODIFIERS])
def test_every_policy_and_modifier_has_a_row_a_paper_and_a_section(name):
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| [`{name}`](#")]
    anchor = row.partition("(#")[2].partition(")")[0]
    assert "](https://" in row
    assert any(line.lower().replace(" ", "-") == f"##-{anchor}" for line in PAGE.splitlines())
    assert f"\n`{name}(" in PAGE


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
    assert write["_modifier"]("kivi", MODIFIERS["kivi"]())[2:] == ("how it is stored", "yes")
