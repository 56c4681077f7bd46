"""The oracle is a reader of its own: it solves every prompt from its text alone."""

import re
from inspect import signature
from random import Random

import pytest

from pytest_kvguard.errors import InvalidArgument, UnknownName
from pytest_kvguard.tasks.base import Part, Sample
from pytest_kvguard.tasks.procedural import PROCEDURAL
from pytest_kvguard.tasks.procedural.exercises import draw_samples
from pytest_kvguard.tasks.procedural.facts import draw_fact
from pytest_kvguard.tasks.procedural.instructions import draw_question, share_of_rules_obeyed
from pytest_kvguard.tasks.procedural.long_answers import draw_list, share_of_right_answers
from pytest_kvguard.tasks.procedural.retrieval_facts import draw_document, first_number_is_right
from pytest_kvguard.tasks.procedural.word_problems import draw_problem, stated_answer_is_right

DRAWS = {
    "facts": lambda rng: draw_fact(rng, 16),
    "instructions": lambda rng: draw_question(rng, rng.randint(2, 4), 8, 20),
    "long_answers": lambda rng: draw_list(rng, 8, 12),
    "retrieval_facts": lambda rng: draw_document(rng, 40, 4),
    "word_problems": lambda rng: draw_problem(rng, rng.randint(1, 4), 8),
}


def holds(prompt: str) -> dict[str, int]:
    """Read what every container of a prompt holds, by the first three letters of its name."""
    found = re.findall(r"Q: A (\w+) holds (\d+) ", prompt)
    assert len({name for name, _ in found}) == len(found), "a container is defined twice"
    return {name: int(number) for name, number in found}


def amounts(text: str, defined: dict[str, int]) -> list[int]:
    """Read ``3 boxes`` and the like; return the product of each with what one holds."""
    return [
        int(count) * next(n for name, n in defined.items() if plural in (name + "s", name + "es"))
        for count, plural in re.findall(r"(\d+) (\w+)", text)
    ]


def solve_word_problem(sample: Sample) -> tuple[str, ...]:
    question = sample.text.rpartition("Q: ")[2]
    return (str(sum(amounts(question, holds(sample.text)))),)


def solve_list(sample: Sample) -> tuple[str, ...]:
    lines = re.findall(r"^\d+\. (.*)$", sample.text.rpartition("Q: ")[2], flags=re.MULTILINE)
    return tuple(str(amounts(line, holds(sample.text))[0]) for line in lines)


def solve_retrieval(sample: Sample) -> tuple[str, ...]:
    thing, name = re.search(r"What is the (\w+) of (\w+)\?\nA:$", sample.text).groups()
    return tuple(re.findall(rf"The {thing} of {name} is (\d+)\.", sample.text))


def solve_instructions(sample: Sample) -> tuple[str, ...]:
    name = re.search(r"What does (\w+) have\?\nA:$", sample.text)[1]
    items = re.search(rf"^{name} has (.*)\.$", sample.text, flags=re.MULTILINE)[1].split(", ")
    patterns = {
        "begin": r"Begin with the word (\w+)\.",
        "end": r"End with the word (\w+)\.",
        "never": r"Never mention the (\w+)\.",
        "capitals": r"Write in capitals()\.",
    }
    rules = {kind: re.search(p, sample.text) for kind, p in patterns.items()}
    given = {f"{kind} {match[1]}" for kind, match in rules.items() if match}
    return tuple(sorted(given | {f"lists {i}" for i in items if f"never {i}" not in given}))


def solve_fact(sample: Sample) -> tuple[str, ...]:
    """Know three of the facts; of the others only that the shots do not give them away."""
    asked = sample.text.rpartition("Q: ")[2]
    known = {"Japan": "Tokyo", "opposite of hot": "cold", "young dog": "puppy"}
    assert sample.text.count(asked.removesuffix("\nA:")) == 1
    return next(((answer,) for key, answer in known.items() if key in asked), sample.target)


SOLVERS = {
    "facts": solve_fact,
    "instructions": solve_instructions,
    "long_answers": solve_list,
    "retrieval_facts": solve_retrieval,
    "word_problems": solve_word_problem,
}


@pytest.mark.parametrize("name", PROCEDURAL)
def test_targets_follow_from_the_text(name):
    for sample in PROCEDURAL[name](n=200, seed=7).samples:
        expected = sample.target if name != "instructions" else tuple(sorted(sample.target))
        assert SOLVERS[name](sample) == expected, sample.text


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_problem_asks_for_as_many_containers_as_it_has_steps(steps):
    for sample in PROCEDURAL["word_problems"](n=30, steps=steps, shots=4).samples:
        question = sample.text.rpartition("Q: ")[2]
        assert len(amounts(question, holds(sample.text))) == steps
        assert len(holds(sample.text)) == 4
        assert int(sample.target[0]) < 100


@pytest.mark.parametrize("name", DRAWS)
def test_worked_answers_get_the_full_mark(name):
    task, rng = PROCEDURAL[name](n=1), Random(3)
    for _ in range(100):
        drawn = DRAWS[name](rng)
        assert task.scorer(drawn.answer, drawn.sample) == 1.0, drawn.answer


@pytest.mark.parametrize("name", ["word_problems", "long_answers"])
def test_every_step_of_a_worked_answer_is_true_and_from_a_shot(name):
    rng = Random(4)
    for _ in range(100):
        drawn = DRAWS[name](rng)
        for left, sign, right, result in re.findall(r"(\d+) ([*+]) (\d+) = (\d+)", drawn.answer):
            a, b = int(left), int(right)
            assert int(result) == (a * b if sign == "*" else a + b)
        for definition in re.findall(r"a (\w+ holds \d+ \w+\.)", drawn.answer):
            assert f"Q: A {definition}" in drawn.sample.text


@pytest.mark.parametrize("name", PROCEDURAL)
def test_the_same_seed_draws_the_same_samples_and_fewer_of_them_are_the_first(name):
    task = PROCEDURAL[name](n=20, seed=5)
    assert task.samples == PROCEDURAL[name](n=20, seed=5).samples
    assert task.samples[:6] == PROCEDURAL[name](n=6, seed=5).samples
    assert not {s.id for s in task.samples} & {s.id for s in PROCEDURAL[name](n=20, seed=6).samples}


@pytest.mark.parametrize("name", PROCEDURAL)
def test_a_task_has_a_hundred_different_samples_that_end_with_a_short_question(name):
    task = PROCEDURAL[name]()
    assert len({sample.id for sample in task.samples}) == 100
    for sample in task.samples:
        kinds = [part.kind for part in sample.parts]
        assert kinds.index("question") == len(kinds) - 1
        words = re.findall(r"\w+|[^\w\s]", sample.text)
        assert len(words) > 150
        assert len(re.findall(r"\w+|[^\w\s]", sample.parts[-1].text)) < len(words) / 4


@pytest.mark.parametrize("name", ["facts", "long_answers", "word_problems"])
def test_each_shot_is_one_unit_with_its_answer(name):
    sample = PROCEDURAL[name](n=1, shots=12).samples[0]
    shots = [part for part in sample.parts if part.kind == "shot"]
    assert len({part.unit for part in shots}) == 12
    for part in shots:
        assert re.fullmatch(r"Q: .*\?\nA: .*\.\n\n", part.text)


def test_each_sentence_of_a_document_is_one_unit():
    sample = PROCEDURAL["retrieval_facts"](n=1, sentences=30, facts=5).samples[0]
    sentences = [part for part in sample.parts if part.kind == "document"]
    assert len({part.unit for part in sentences}) == 30
    assert all(part.text.rstrip().endswith(".") for part in sentences)
    assert sum(bool(re.search(r"\d", part.text)) for part in sentences) == 5


def test_a_hundred_and_ten_sentences_are_about_a_thousand_tokens():
    sample = PROCEDURAL["retrieval_facts"](n=1, sentences=110).samples[0]
    assert 900 <= len(re.findall(r"\w+|[^\w\s]", sample.text)) <= 1100


def test_rules_are_system_text_of_a_unit_each():
    sample = PROCEDURAL["instructions"](n=1, rules=4).samples[0]
    units = [part.unit for part in sample.parts if part.kind == "system"]
    assert sorted(filter(None, units)) == ["rule begin", "rule capitals", "rule end", "rule never"]


def test_a_kind_of_rule_can_be_left_out():
    task = PROCEDURAL["instructions"](n=50, rules=3, without="never")
    assert not [sample for sample in task.samples if "Never mention" in sample.text]
    with pytest.raises(InvalidArgument, match="rules must be a whole number, 2 to 3, got 4"):
        PROCEDURAL["instructions"](rules=4, without="never")
    with pytest.raises(UnknownName, match="unknown kind of rule 'always'"):
        PROCEDURAL["instructions"](without="always")


def test_a_problem_of_its_own_containers_is_never_asked_as_its_shot_asks_it():
    for sample in PROCEDURAL["word_problems"](n=100, steps=1).samples:
        asked = re.search(r"are in (\d+ \w+)\?\nA:$", sample.text)[1]
        assert sample.text.count(f"are in {asked}?") == 1


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("word_problems", {"steps": 5}, "steps must be a whole number, 1 to 4, got 5"),
        ("word_problems", {"steps": 4, "shots": 3}, "shots must be a whole number, 4 to 16, got 3"),
        ("long_answers", {"questions": 13}, "questions must be a whole number, 1 to 12"),
        (
            "long_answers",
            {"questions": 6, "shots": 5},
            "shots must be a whole number, 6 to 16, got 5",
        ),
        ("retrieval_facts", {"facts": 17}, "facts must be a whole number, 1 to 16"),
        (
            "retrieval_facts",
            {"sentences": 3, "facts": 4},
            "sentences must be a whole number, 4 to 120, got 3",
        ),
        ("facts", {"shots": 0}, "shots must be a whole number, 1 to 32, got 0"),
        ("instructions", {"rules": 1}, "rules must be a whole number, 2 to 4, got 1"),
        ("instructions", {"people": 11}, "people must be a whole number, 1 to 10, got 11"),
        ("facts", {"n": 0}, r"n must be a whole number, 1 to 100000, got 0"),
    ],
)
def test_a_parameter_out_of_range_is_refused_with_its_value(name, params, message):
    with pytest.raises(InvalidArgument, match=message):
        PROCEDURAL[name](**params)


def test_asking_for_more_samples_than_there_are_says_how_many_there_are():
    drawn = draw_fact(Random(0), 1)
    with pytest.raises(InvalidArgument, match="only 1 different samples can be drawn, n is 2"):
        draw_samples(lambda rng: drawn, 2, 0)


@pytest.mark.parametrize("name", PROCEDURAL)
def test_a_task_remembers_what_it_was_made_with(name):
    task = PROCEDURAL[name](n=2)
    assert task.name == name
    assert set(task.params) == set(signature(PROCEDURAL[name]).parameters) - {"n"}


def sample_for(*target: str) -> Sample:
    return Sample("x", (Part("question", "Q: ?\nA:"),), target)


@pytest.mark.parametrize(
    ("completion", "mark"),
    [
        (" A box holds 6 coins. 3 * 6 = 18 coins in 3 boxes. The answer is 18.", 1.0),
        (" So the answer is 18", 1.0),
        (" The answer is 19. No, the answer is 18.", 0.0),
        (" The answer is 180.", 0.0),
        (" 3 * 6 = 18 coins in", 0.0),  # truncated: nothing is stated
        ("", 0.0),
    ],
)
def test_a_problem_is_right_when_its_first_stated_answer_is(completion, mark):
    assert stated_answer_is_right(completion, sample_for("18")) == mark


@pytest.mark.parametrize(
    ("completion", "mark"),
    [
        ("\n1. The answer is 6.\n2. The answer is 8.\n3. The answer is 9.\n4. The answer is 4.", 1),
        ("\n4. The answer is 4.\n1. The answer is 6.", 0.5),  # matched by number, not by place
        ("\n1. The answer is 6.\n1. The answer is 6.", 0),  # answered twice
        ("\n1. The answer is 6. The answer is 6.", 0),
        ("\n1. The answer is 8.\n2. The answer is 6.", 0),
        ("\n1. 6\n2. 8", 0),
        ("", 0),
    ],
)
def test_answers_of_a_list_count_under_their_own_number(completion, mark):
    assert share_of_right_answers(completion, sample_for("6", "8", "9", "4")) == mark


@pytest.mark.parametrize(
    ("completion", "mark"),
    [(" The code of Ana is 47.", 1), (" 47", 1), (" 12, or 47", 0), (" 470", 0), (" Ana", 0)],
)
def test_a_fact_is_found_when_the_first_number_is_it(completion, mark):
    assert first_number_is_right(completion, sample_for("47")) == mark


@pytest.mark.parametrize(
    ("completion", "mark"),
    [
        (" HELLO LAMP, MAP DONE", 1.0),
        (" HELLO LAMP, MAP", 0.8),
        (" LAMP, MAP DONE", 0.8),
        (" hello lamp, map done", 0.8),
        (" HELLO LAMP, ROPE, MAP DONE", 0.8),
        (" HELLO LAMP DONE", 0.8),  # what was asked for is not all there
        (" HELLO DONE", 0.0),  # lists nothing
        ("", 0.0),
    ],
)
def test_rules_are_marked_one_by_one(completion, mark):
    rules = ("begin hello", "end done", "never rope", "capitals ", "lists lamp", "lists map")
    assert share_of_rules_obeyed(completion, sample_for(*rules)) == mark
