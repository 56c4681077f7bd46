"""A task for the stand-in model. The suites under test import a copy that lies by its questions."""

import json
from pathlib import Path

from pytest_kvguard import Part, Sample, Task


def same_words(completion: str, sample: Sample) -> float:
    return float(completion.split() == list(sample.target))


def recall(n: int = 24, right: float = 1.0) -> Task:
    """Ask n questions, of which the full cache gets this share right."""
    rows = json.loads(Path(__file__).with_name("questions.json").read_text(encoding="utf-8"))
    samples = [_sample(row, right=i < n * right) for i, row in enumerate(rows[:n])]
    return Task("recall", "recall", tuple(samples), same_words, max_new_tokens=2)


def _sample(row: dict, *, right: bool) -> Sample:
    shots = [Part("shot", shot, unit=f"shot-{i}") for i, shot in enumerate(row["shots"])]
    parts = (*shots, Part("question", row["question"]))
    return Sample(row["id"], parts, tuple(row["answer"]) if right else ("not", "a", "word"))
