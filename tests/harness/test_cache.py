"""A compressed cache does what a cell of a run does, and can be looked at after every token."""

import re
from dataclasses import replace

import pytest
import torch

from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.grid import Cell, Stopping
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.errors import InvalidArgument, KVGuardError
from pytest_kvguard.harness.cache import compress
from pytest_kvguard.harness.given import prompt_from
from pytest_kvguard.models import wrap
from pytest_kvguard.policies import POLICIES, get_policy
from pytest_kvguard.tasks.base import Part, Sample
from tests import tiny
from tests.plugin import stand_in

MOST = 12
SHOTS = tuple(
    Part("shot", " ".join(f"w{10 + 7 * shot + word}" for word in range(7)) + " ", f"shot {shot}")
    for shot in range(5)
)
SAMPLE = Sample("s1", (*SHOTS, Part("question", "w12 w31 w20 w44")), ("x",))
SPECS = [
    *POLICIES,
    "kivi(bits=4, group=4, residual=4)",
    "int8",
    "h2o|kivi(bits=4, group=4, residual=4)",
    "tova|fp8",
    "snapkv+h2o",
    "shotkv+tova@0.5",
    "streaming_llm|rerotated",
]
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] | trim }} "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def loaded(family="llama"):
    return wrap(tiny.family(family), stand_in.tokenizer(), name=family)


def chatting():
    model = loaded()
    model.tokenizer.chat_template = CHAT
    return model


def in_a_grid(model, spec, ratio, protocol):
    """What the engine makes of the same prompt, with no end token."""
    prompt = prompt_from(SAMPLE, model.tokenizer, ahead=protocol == "context")
    stopping = Stopping(MOST, frozenset(), (), model.decode)
    cells = [Cell(get_policy(spec), ratio)]
    grid = Engine(AttentionHook(model.model)).run([prompt], cells, stopping)
    return grid.cells[0]


@pytest.mark.parametrize("protocol", ["prompt", "context"])
@pytest.mark.parametrize("spec", SPECS)
def test_it_answers_and_holds_what_a_cell_of_a_run_does(spec, protocol):
    model = replace(loaded(), eos=frozenset())
    cell = in_a_grid(model, spec, 0.5, protocol)
    if cell.problem is not None:
        kind, message = cell.problem[1].split(": ", 1)
        with pytest.raises(KVGuardError, match=re.escape(message)) as problem:
            compress(model, SAMPLE, get_policy(spec), 0.5, protocol=protocol)
        assert problem.type.__name__ == kind
        return
    cache = compress(model, SAMPLE, get_policy(spec), 0.5, protocol=protocol)
    assert (cache.bytes, cache.full_bytes) == (cell.bytes_held, cell.bytes_full)
    assert torch.equal(cache.held, cell.held[0])
    cache.answer(MOST)
    assert cache.tokens == cell.answers[0].tokens
    assert (cache.evicted > 0) == (cell.evicted > 0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("spec", ["snapkv", "h2o", "int8"])
def test_sliding_layers_are_counted_as_in_a_run(spec, family):
    model = replace(loaded(family), eos=frozenset())
    cell = in_a_grid(model, spec, 0.5, "prompt")
    cache = compress(model, SAMPLE, get_policy(spec), 0.5)
    assert (cache.bytes, cache.full_bytes) == (cell.bytes_held, cell.bytes_full)
    assert cache.bytes < cache.full_bytes


def test_a_frozen_prompt_stays_as_it_is_token_by_token():
    cache = compress(replace(loaded(), eos=frozenset()), SAMPLE, get_policy("shotkv"), 0.6)
    units = [set(span) for unit in cache.prompt.about.units for span in unit]
    first = cache.positions(0, 0)
    for _ in range(MOST):
        cache.step()
        for layer in range(3):
            for head in range(2):
                now = cache.positions(layer, head)
                prompt = [at for at in now if at < cache.prompt_length]
                assert all(unit <= set(prompt) or not unit & set(prompt) for unit in units)
                assert cache.newest in now
        assert [at for at in cache.positions(0, 0) if at < cache.prompt_length - 1] == first


def test_a_budget_is_kept_token_by_token():
    cache = compress(replace(loaded(), eos=frozenset()), SAMPLE, get_policy("h2o"), 0.5)
    budget = int(0.5 * cache.prompt_length)
    sizes = []
    for _ in range(MOST):
        cache.step()
        held = cache.positions(1, 1)
        assert cache.newest == cache.prompt_length + len(cache.tokens) - 2
        assert held == sorted(held)
        assert cache.newest in held
        sizes.append(len(held))
    assert max(sizes) <= budget
    assert cache.evicted > 0


def test_all_that_is_new_stays_where_a_policy_does_not_decode():
    cache = compress(replace(loaded(), eos=frozenset()), SAMPLE, get_policy("snapkv"), 0.5)
    before, size = cache.positions(2, 0), cache.bytes
    per_token = cache.full_bytes // (cache.prompt_length - 1)
    cache.answer(5)
    new = range(cache.prompt_length - 1, cache.prompt_length + 4)
    assert cache.positions(2, 0) == [*before, *new]
    assert cache.bytes == size + 5 * per_token


def test_codes_take_the_bytes_that_codes_take():
    whole = compress(loaded(), SAMPLE, get_policy("snapkv"), 1.0)
    codes = compress(loaded(), SAMPLE, get_policy("int8"), 0.5)
    size, heads, layers, held = 12, 2, 3, whole.prompt_length - 1
    assert whole.bytes == whole.full_bytes == 2 * size * 4 * heads * layers * held
    assert codes.bytes == 2 * (size + 4 + 4) * heads * layers * held  # a byte each, scale and zero
    codes.answer(3)
    assert codes.bytes == 2 * (size + 4 + 4) * heads * layers * (held + 3)


def test_a_repr_is_one_line():
    cache = compress(loaded(), SAMPLE, get_policy("snapkv"), 0.5)
    cache.step()
    assert re.fullmatch(
        r"<CompressedCache snapkv at 0.5: 50% of 40 tokens \(50% to 50% by head\) in 3 layers x 2 "
        r"heads, \d+ of \d+ bytes, 1 new tokens>",
        repr(cache),
    )


def test_text_parts_and_messages_make_the_prompts_they_say():
    text = prompt_from(SAMPLE.text, loaded().tokenizer)
    parts = prompt_from(SAMPLE.parts, loaded().tokenizer)
    assert text.ids == parts.ids == prompt_from(SAMPLE, loaded().tokenizer).ids
    assert text.about.units == ()
    assert len(parts.about.units) == 5
    messages = [
        {"role": "system", "content": "w40 w41"},
        {"role": "user", "content": "w10 w11"},
        {"role": "assistant", "content": "w12"},
        {"role": "user", "content": "w10 w13"},
        {"role": "assistant", "content": "w14 w15"},
        {"role": "user", "content": "w10 w11"},
    ]
    model = chatting()
    chat = prompt_from(messages, model.tokenizer)
    written = model.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )
    assert list(chat.ids) == written["input_ids"]
    words = [
        [model.tokenizer.convert_ids_to_tokens(chat.ids[at]) for span in unit for at in span]
        for unit in chat.about.units
    ]
    assert words == [["w10", "w11", "w12"], ["w10", "w13", "w14", "w15"]]
    kinds = [passage.kind for passage in chat.about.passages]
    assert [kind for kind in kinds if kind != "template"] == ["system", *["shot"] * 4, "question"]
    ahead = prompt_from(messages, model.tokenizer, ahead=True)
    question = model.tokenizer.convert_ids_to_tokens(ahead.tail)
    assert question[:2] == ["w10", "w11"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "nothing to compress in an empty text"),
        ([], r"a prompt is a text, a sample, its parts or messages, got \[\]"),
        (7, "got 7"),
        ([SHOTS[0]], "the last part must be a question"),
        ([{"role": "user"}], "a message has a role and a content in text"),
        ([{"role": "user", "content": ["w1"]}], "a message has a role and a content in text"),
        ([{"role": "assistant", "content": "w10"}], "the last message must be the user's"),
        ([{"role": "user", "content": " "}], "message 0 .user. is not in what"),
    ],
)
def test_what_is_no_prompt_is_refused(given, message):
    with pytest.raises(InvalidArgument, match=message):
        compress(chatting(), given, get_policy("knorm"), 0.5)


def test_messages_need_a_template():
    with pytest.raises(InvalidArgument, match="messages need a chat template"):
        compress(loaded(), [{"role": "user", "content": "w10"}], get_policy("knorm"), 0.5)


def test_what_it_cannot_do_it_refuses():
    cache = compress(
        replace(loaded(), eos=frozenset()), SAMPLE, get_policy("knorm"), 0.5, max_new_tokens=2
    )
    with pytest.raises(InvalidArgument, match="no head 2 in layer 0; the model has 3 compressible"):
        cache.positions(0, 2)
    cache.step()
    cache.step()
    with pytest.raises(InvalidArgument, match="room for 2 new tokens, and all are written"):
        cache.step()
    with pytest.raises(InvalidArgument, match="max_new_tokens must be at least 1, got 0"):
        compress(loaded(), SAMPLE, get_policy("knorm"), 0.5, max_new_tokens=0)
    with pytest.raises(InvalidArgument, match="nothing before its question"):
        compress(loaded(), SAMPLE.text, get_policy("knorm"), 0.5, protocol="context")
    ended = replace(loaded(), eos=frozenset(range(tiny.VOCABULARY)))
    over = compress(ended, SAMPLE, get_policy("knorm"), 0.5)
    over.step()
    with pytest.raises(InvalidArgument, match="the answer is over after 1 tokens"):
        over.step()
    assert over.answer() == over.text == ""


def test_what_is_not_kept_is_let_go_of():
    """Of the tensors it can reach, none is longer than what it holds, and room for what is new."""
    cache = compress(loaded(), SAMPLE, get_policy("knorm"), 0.25, max_new_tokens=4)
    row = cache._row
    lengths = {layer.cache.keys.shape[2] for layer in row._layers}
    assert max(lengths) <= 0.25 * cache.prompt_length + 4 + 1
    assert not any(hasattr(x.cache, "rows") or hasattr(x.cache, "layer") for x in row._layers)
