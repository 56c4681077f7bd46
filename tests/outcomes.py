"""Everything a measurement can come to, drawn."""

import dataclasses
from collections.abc import Mapping, Sequence

from hypothesis import strategies as st

from pytest_kvguard.harness.compare import Comparison
from pytest_kvguard.harness.records import FULL, Answer, Counts, Fidelity, Held, Run
from pytest_kvguard.report.record import not_run, to_cell
from pytest_kvguard.session import Measurement

MODES = ("gate", "proved", "regression")
ODD = (
    "|",
    "`x`",
    "a\nb",
    "<b>&amp;",
    "*_~$#[](!)",
    "\x1b[2J\0",
    "1. x",
    "- x",
    "",
    "ж検",
    "\ud800",
)
fractions = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1 / 3, 5e-324, 1e-200]), st.floats(0, 1))
below_one = st.one_of(st.sampled_from([0.0, 0.1, 0.25, 0.9]), st.floats(0, 1, exclude_max=True))
above_zero = st.one_of(st.sampled_from([0.25, 0.5, 1.0]), st.floats(0, 1, exclude_min=True))
names = st.one_of(st.sampled_from(["retrieval", "snapkv", *ODD]), st.text(max_size=8))
anything = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), names, st.binary())
params = st.dictionaries(names, st.one_of(anything, st.tuples(anything, anything)), max_size=2)
sizes = st.sampled_from([0, 20, 80])
counts = st.builds(Counts, *[st.integers(0, 99)] * 4)
shares = st.builds(Held, fractions, fractions, fractions)
errors = st.one_of(st.none(), names)


@st.composite
def marks(draw: st.DrawFn, *, sound: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Draw the scores of both runs: right, wrong or in between; of a model that is able or not.

    Where the runs are not sound there may be no samples, or the compressed run may lack one.
    """
    n = draw(st.sampled_from([6, 24, 50] if sound else [0, 1, 24]))
    least, most = draw(st.sampled_from([(n // 2, n), (n // 2, n), (0, n), (0, 0)]))
    if draw(st.booleans()):
        right = draw(st.integers(least, most))
        still = draw(st.one_of(st.just(right), st.integers(0, n)))
        before, after = ([float(i < k) for i in range(n)] for k in (right, still))
    else:
        before, after = (draw(st.lists(fractions, min_size=n, max_size=n)) for _ in range(2))
        before = [1.0] * least + before[least:most] + [0.0] * (n - most)
    lost = 0 if sound else draw(st.integers(0, 1))
    scores = [{f"s{i}": score for i, score in enumerate(found)} for found in (before, after)]
    return scores[0], dict(list(scores[1].items())[lost:])


def contexts(scores: Mapping[str, float]) -> st.SearchStrategy[dict[str, str]]:
    """Draw which samples share a context: none, all, or some with some."""
    labels = [{sample: str(i // size) for i, sample in enumerate(scores)} for size in (4, 99)]
    some = dict(list(labels[0].items())[2:])
    return st.sampled_from([{}, *labels, some])


@st.composite
def comparisons(draw: st.DrawFn, modes: Sequence[str] = MODES) -> Comparison:
    """Draw a comparison: of runs that can be judged, that cannot, and that are too weak."""
    sound = draw(st.sampled_from([True, True, False]))
    before, after = draw(marks(sound=sound))
    task = {
        "task": draw(names),
        "ability": draw(names),
        "protocol": draw(st.sampled_from(["prompt", "context"])),
        "higher_is_better": draw(st.booleans()),
        "chance": 0.0 if sound else draw(below_one),
        "clusters": draw(contexts(before)),
    }
    base = Run(
        policy=FULL,
        params={},
        ratio=1.0,
        scores=before,
        disagreements=draw(st.integers(0, 2)),
        error=None if sound else draw(errors),
        bytes_full=80,
        bytes_held=80,
        counts=draw(counts),
        **task,
    )
    held = Held(0.1, 0.2, 0.3)
    kept = Run(
        policy=draw(names),
        params=draw(params),
        ratio=0.25 if sound else draw(above_zero),
        scores=after,
        answers=draw(st.sampled_from([{}, {"s0": Answer("x", 3, stopped=False)}])),
        saves=draw(st.sampled_from(["positions", "bytes", "reads"])),
        held=held if sound else draw(st.one_of(st.none(), shares)),
        read=0.2 if sound else draw(st.one_of(st.none(), fractions)),
        bytes_full=80 if sound else draw(sizes),
        bytes_held=20 if sound else draw(sizes),
        evicted=draw(st.booleans()),
        error=None if sound else draw(errors),
        units=draw(st.sampled_from([None, "shots", "sentences"])),
        fidelity=draw(st.one_of(st.none(), st.builds(Fidelity, st.floats(), st.floats()))),
        counts=draw(counts),
        seconds=draw(st.floats(0, 1e6)),
        **task,
    )
    level = draw(st.sampled_from([0.9, 0.5, 0.99]))
    return Comparison(base, kept, draw(below_one), level=level, mode=draw(st.sampled_from(modes)))


@st.composite
def outcomes(draw: st.DrawFn, modes: Sequence[str] = MODES) -> Measurement:
    """Draw what a test gets: a comparison, or a task that was given up."""
    c = draw(comparisons(modes))
    model, spec = draw(names), draw(names)
    if draw(st.integers(0, 4)):
        return Measurement(c, to_cell(c, model=model, spec=spec), c.weakness)
    why = draw(names) or "the model is too weak for this task"
    cell = not_run(
        c.base,
        dataclasses.replace(c.kept, scores={}),
        model=model,
        spec=spec,
        max_drop=c.max_drop,
        level=c.level,
        skipped=c.mode != "proved",
        reason=why,
    )
    return Measurement(None, cell, why)
