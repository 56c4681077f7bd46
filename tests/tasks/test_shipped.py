"""Promises about the tasks this package ships, and the data that comes with it."""

import hashlib
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from pytest_kvguard import tasks
from pytest_kvguard.errors import InvalidArgument, UnknownName
from pytest_kvguard.specs import Spec
from pytest_kvguard.tasks import TASKS, get_task, register_task
from pytest_kvguard.tasks.arithmetic import arithmetic
from pytest_kvguard.tasks.base import Task
from pytest_kvguard.tasks.gsm8k import worked_examples
from pytest_kvguard.tasks.long_generation import long_generation
from pytest_kvguard.tasks.numerals import numbers
from pytest_kvguard.tasks.prompt import render
from pytest_kvguard.tasks.world_knowledge import world_knowledge

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=sorted(TASKS))
def task(request):
    return get_task(request.param)


def test_ids_are_unique_and_the_same_in_every_run(task):
    ids = [sample.id for sample in task.samples]
    assert len(set(ids)) == len(ids) > 0
    assert task.samples == get_task(task.name).samples


def test_every_prompt_can_be_rendered_and_covers_its_parts(task):
    for sample in task.samples:
        assert render(sample).text == "".join(part.text for part in sample.parts)


def test_every_prompt_has_a_context_and_a_task_knows_its_name(task):
    assert task.name in TASKS
    assert all(sample.parts[0].kind != "question" for sample in task.samples)


def test_an_answer_of_nothing_scores_nothing(task):
    assert {task.scorer("", sample) for sample in task.samples} == {0.0}


def test_every_problem_has_one_number_as_its_answer():
    samples = arithmetic().samples
    assert len(samples) == 100
    assert all(len(numbers(sample.target[0])) == 1 for sample in samples)
    assert samples[0].id == "gsm8k-test-0013"
    assert samples[0].target == ("18",)


def test_every_worked_example_ends_with_the_number_the_scorer_reads():
    answers = ["6", "5", "39", "8", "9", "29", "33", "8"]
    for shot, answer in zip(worked_examples(8), answers, strict=True):
        assert shot.answer.endswith(f"The answer is {answer}.")


def test_arithmetic_shows_so_many_shots_each_a_unit():
    parts = arithmetic(shots=3).samples[0].parts
    assert [part.kind for part in parts] == ["shot", "shot", "shot", "question"]
    assert len({part.unit for part in parts[:3]}) == 3
    assert parts[-1].unit is None
    assert [part.kind for part in arithmetic(shots=0).samples[0].parts] == ["question"]


def test_the_letters_are_balanced_in_every_four_questions():
    letters = [sample.target[0] for sample in world_knowledge().samples]
    assert Counter(letters) == dict.fromkeys("ABCD", 50)
    fours = [letters[i : i + 4] for i in range(0, 200, 4)]
    assert all(sorted(four) == ["A", "B", "C", "D"] for four in fours)
    assert len({tuple(four) for four in fours}) > 10  # in no order that could be guessed


def test_the_shots_of_a_question_show_every_letter():
    for sample in world_knowledge().samples:
        shown = {part.text.strip()[-1] for part in sample.parts if part.kind == "shot"}
        assert shown == set("ABCD")


def test_a_question_is_a_small_part_of_its_prompt_and_among_no_shots():
    for sample in world_knowledge().samples:
        question = sample.parts[-1].text
        assert len(question) < len(sample.text) / 5
        assert question not in sample.text[: -len(question)]


def test_neighbours_share_a_context():
    contexts = [sample.parts[:-1] for sample in world_knowledge().samples]
    assert sum(a != b for a, b in pairwise(contexts)) == 7
    assert Counter(contexts).most_common(1)[0][1] == 25
    assert all(len(sample.parts) == 1 + 2 + 1 for sample in world_knowledge(shots=2).samples)


def test_a_shot_of_long_generation_is_a_question_and_an_answer_far_apart():
    sample = long_generation(questions=2, shots=3).samples[0]
    shots = [(part.unit, part.text.split(":")[0]) for part in sample.parts if part.kind == "shot"]
    assert shots == [
        ("shot 1", "Question_1"), ("shot 2", "Question_2"), ("shot 3", "Question_3"),
        ("shot 1", "Answer_1"), ("shot 2", "Answer_2"), ("shot 3", "Answer_3"),
    ]  # fmt: skip


def test_long_generation_asks_every_problem_once_and_marks_each():
    task = long_generation(questions=3, shots=2)
    assert len(task.samples) == 33
    problems = arithmetic().samples
    assert [t for sample in task.samples for t in sample.target] == [
        problem.target[0] for problem in problems[:99]
    ]
    sample = task.samples[0]
    for i, problem in enumerate(problems[:3], start=3):
        asked = problem.parts[-1].text.removeprefix("Q: ").removesuffix("\nA:")
        assert f"Question_{i}: {asked}\n" in sample.parts[-1].text
    right = [f"Answer_{i}: So. The answer is {t}.\n" for i, t in enumerate(sample.target, start=3)]
    assert task.scorer("".join(right), sample) == 1
    assert task.scorer("".join(right[1:]), sample) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("arithmetic(shots=9)", "shots must be a whole number, 0 to 8, got 9"),
        ("arithmetic(shots=1.5)", "shots must be a whole number, 0 to 8, got 1.5"),
        ("arithmetic(shots=true)", "got True"),
        ("world_knowledge(shots=-1)", "shots must be a whole number, 0 to 5, got -1"),
        ("long_generation(questions=0)", "questions must be a whole number, 1 to 100, got 0"),
    ],
)
def test_parameters_out_of_range_are_refused(spec, why):
    with pytest.raises(InvalidArgument, match=why):
        get_task(spec)


def test_more_questions_than_problems_are_refused(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n')
    with pytest.raises(InvalidArgument, match=r"questions=4 but .*few.jsonl.* holds only 1"):
        long_generation(data=str(path))


def test_a_spec_sets_parameters_and_overrides_win():
    assert get_task("arithmetic").params["shots"] == 8
    assert get_task("arithmetic(shots=2)").params["shots"] == 2
    assert get_task("arithmetic(shots=2)", shots=3).params["shots"] == 3
    assert get_task(Spec("arithmetic", {"shots": 2})).samples == arithmetic(shots=2).samples


def test_unknown_names_and_parameters_come_with_the_known_ones():
    with pytest.raises(UnknownName, match="unknown task 'arithmetics'; did you mean 'arithmetic'"):
        get_task("arithmetics")
    with pytest.raises(UnknownName, match=r"unknown parameter of arithmetic 'shot'.*data, shots"):
        get_task("arithmetic(shot=2)")


def test_a_task_can_be_registered_under_a_free_name(monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", dict(TASKS))
    mine = Task("mine", "any", (), lambda *_: 0.0, max_new_tokens=1)

    def factory(*, size: int = 1):
        return mine

    register_task("mine", factory)
    register_task("mine", factory)
    assert get_task("mine(size=2)") is mine
    with pytest.raises(InvalidArgument, match="task 'arithmetic' is already registered"):
        register_task("arithmetic", factory)
    with pytest.raises(InvalidArgument, match="must be an identifier, got 'my task'"):
        register_task("my task", factory)


def test_importing_the_tasks_loads_no_model_library_and_reads_no_data():
    program = (
        "import sys, pytest_kvguard.tasks as t\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'jinja2', 'pydoc_data.topics'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_the_vendored_files_are_the_ones_the_script_writes():
    data = ROOT / "pytest_kvguard" / "tasks" / "data"
    sums = (ROOT / "fixtures" / "data" / "SHA256SUMS").read_text().split("\n")[:-1]
    written = dict(reversed(line.split()) for line in sums)
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in data.glob("*.jsonl")}
    assert found == written
    assert sum(path.stat().st_size for path in data.iterdir()) < 400_000


def test_every_vendored_file_is_credited():
    notice = (ROOT / "NOTICE").read_text()
    for path in (ROOT / "pytest_kvguard" / "tasks" / "data").iterdir():
        assert path.name in notice
