"""What is protected, by the prompt or by a policy, is held to the end of the answer."""

import pytest
import torch

from pytest_kvguard.engine.cache import evicting
from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.grid import Cell, Prompt, Stopping
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.engine.settings import Settings
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.base import EMPTY
from tests.tiny import family, tokens

LENGTH, RATIO = 40, 0.3
STOPPING = Stopping(20, frozenset(), (), lambda ids: " ".join(map(str, ids)))


def watched(monkeypatch, spec: str, prompt: Prompt, ratio: float = RATIO) -> tuple[set, list]:
    """Answer under a policy; return which positions went while decoding, and all that was held."""
    gone, held = set(), []
    real = evicting.victims

    def watching(eviction, state):
        slots = real(eviction, state)
        at = state.positions.gather(2, slots.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        gone.update(at[slots != EMPTY].tolist())
        held.extend(set(head) - {EMPTY} for head in state.positions[0].tolist())
        return slots

    monkeypatch.setattr(evicting, "victims", watching)
    engine = Engine(AttentionHook(family("llama")), settings=Settings(capacity=1, growth=2))
    grid = engine.run([prompt], [Cell(get_policy(spec), ratio)], STOPPING)
    assert grid.cells[0].problem is None
    assert len(grid.cells[0].answers[0].tokens) == STOPPING.most
    return gone, held


def a_prompt(protected=(), context=0, ahead=False) -> Prompt:
    return Prompt(tuple(tokens(LENGTH)), context, ahead, protected=protected)


ROLLING = ["h2o", "tova", "streaming_llm(sinks=0)", "snapkv+h2o(heavy=0.25)", "knorm+tova"]


@pytest.mark.parametrize("spec", ROLLING)
def test_what_the_prompt_protects_stays_while_decoding(spec, monkeypatch):
    mine = {3, 17, 18, 31}
    gone, held = watched(monkeypatch, spec, a_prompt(tuple(mine)))
    assert any(at < LENGTH for at in gone)  # others of the prompt do go
    assert all(mine <= head for head in held)
    assert max(map(len, held)) <= RATIO * LENGTH


@pytest.mark.parametrize("spec", ["h2o", "tova", "streaming_llm(sinks=0)|kivi(group=4,residual=4)"])
@pytest.mark.parametrize(
    ("modifier", "mine"),
    [("whitelist(first=2, last=3)", {0, 1, 37, 38, 39}), ("boundary(share=0.05)", {0, 1, 38, 39})],
)
def test_what_a_modifier_requires_stays_while_decoding(spec, modifier, mine, monkeypatch):
    gone, held = watched(monkeypatch, f"{spec}|{modifier}", a_prompt())
    assert any(at < LENGTH for at in gone)
    assert not mine & gone
    assert mine - {LENGTH - 1} <= set.intersection(*held)


def test_a_question_fed_later_stays_where_it_is_protected(monkeypatch):
    mine = tuple(range(36, 40))
    gone, held = watched(monkeypatch, "tova", a_prompt(mine, context=30, ahead=True))
    assert any(30 <= at < 36 for at in gone)
    assert not gone & set(mine)
    assert max(map(len, held)) <= RATIO * 30 + 1  # the first one fed finds the budget full


@pytest.mark.parametrize("spec", ROLLING)
def test_where_all_the_budget_is_protected_two_more_are_held(spec, monkeypatch):
    mine = (*range(11), LENGTH - 1)  # with the last token, which is fed again, N = 12
    _, held = watched(monkeypatch, spec, a_prompt(mine))
    assert all(set(mine[:-1]) <= head for head in held)
    assert max(map(len, held)) == 14


def test_the_last_token_is_not_protected_by_being_fed_again(monkeypatch):
    gone, _ = watched(monkeypatch, "streaming_llm(sinks=0)", a_prompt())
    assert LENGTH - 1 in gone
    assert torch.tensor(sorted(gone)).diff().eq(1).all()  # from the oldest on
