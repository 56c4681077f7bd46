"""How time and memory grow: ``python benchmarks/scaling.py``.

Seconds and peak memory against the number of cells, the length of prompts, the number of samples
and the length of answers, one at a time, each point in a process of its own. The slope is that of
a line through the logarithms, over the larger half of the points, where start-up no longer
counts: 1 is linear, less is cheaper than that. ``--memory`` bounds caches and logits.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice

import numpy as np


@dataclass(frozen=True)
class Point:
    """One grid on random tokens."""

    cells: int = 12
    length: int = 1024  # tokens of a prompt
    samples: int = 4
    new: int = 24  # tokens of an answer; no answer ends by itself
    memory: int = 2**30  # bytes


AXES = {
    "cells": (3, 6, 12, 24, 48),
    "length": (512, 1024, 2048, 4096, 8192),
    "samples": (2, 4, 8, 16, 32),
    "new": (16, 32, 64, 128, 256),
    "memory": (2**26, 2**27, 2**28, 2**29, 2**30),
}
SPECS = ("snapkv", "knorm", "chunkkv", "pyramidkv")


def main() -> None:
    """Run every point of the axes asked for, and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--axis", choices=sorted(AXES), action="append", help="all when left out")
    parser.add_argument("--model", default="reasoner")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--point", help=argparse.SUPPRESS)  # a worker's
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(Point(**json.loads(args.point)), args.model, args.threads)))
        return
    for axis in args.axis or AXES:
        points = [replace(Point(), **{axis: value}) for value in AXES[axis]]
        if axis == "memory":
            points = [replace(point, samples=16) for point in points]
        done = [run(point, args.model, args.threads) for point in points]
        print("\n".join(table(axis, done)), flush=True)


def run(point: Point, model: str, threads: int) -> dict[str, float]:
    """Measure a point in a process of its own."""
    settings = [f"--model={model}", f"--threads={threads}", f"--point={json.dumps(asdict(point))}"]
    done = subprocess.run(
        [sys.executable, __file__, *settings], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(point: Point, model: str, threads: int) -> dict[str, float]:
    """Run one grid and say what it took."""
    import resource

    import torch

    from pytest_kvguard.engine.engine import Engine
    from pytest_kvguard.engine.grid import Cell, Prompt, Stopping
    from pytest_kvguard.engine.model import AttentionHook
    from pytest_kvguard.models import load
    from pytest_kvguard.policies import get_policy

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux

    torch.set_num_threads(threads)
    loaded = load(model)
    generator = torch.Generator().manual_seed(0)
    vocabulary = loaded.model.config.vocab_size
    drawn = torch.randint(4, vocabulary, (point.samples, point.length), generator=generator)
    prompts = [Prompt(tuple(row), context=0) for row in drawn.tolist()]
    policies = [get_policy(spec) for spec in SPECS]
    count = -(-point.cells // len(SPECS))
    ratios = [0.1 + 0.8 * i / count for i in range(count)]
    pairs = [(policy, ratio) for ratio in ratios for policy in policies]
    cells = [Cell(*pair) for pair in islice(cycle(pairs), point.cells)]
    engine = Engine(AttentionHook(loaded.model), memory=point.memory)
    engine.run([Prompt(prompts[0].ids[:40], context=0)], cells[:1], stopping(loaded, 2, Stopping))
    before, began = peak(), time.perf_counter()
    grid = engine.run(prompts, cells, stopping(loaded, point.new, Stopping))
    seconds = time.perf_counter() - began
    problems = [outcome.problem for outcome in grid.cells.values() if outcome.problem]
    if problems:
        raise SystemExit(f"cells that could not be run: {problems}")
    held = grid.baseline.bytes_full / 2**20
    return asdict(point) | {
        "seconds": seconds,
        "MiB": peak() - before,
        "full caches": held,
        "tokens": engine.hook.tokens,
        "forwards": engine.hook.forwards,
        "prefills": grid.prefills,
    }


def stopping(loaded, new, Stopping):
    """Let no answer end before it has this many tokens."""
    return Stopping(new, frozenset(), (), loaded.decode)


def table(axis: str, done: list[dict[str, float]]) -> list[str]:
    """Return a Markdown table of one axis, the slopes below it."""
    lines = [
        f"| {axis} | seconds | peak MiB above the model | full caches MiB | tokens | forwards |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for one in done:
        lines.append(
            f"| {one[axis]:,.0f} | {one['seconds']:.2f} | {one['MiB']:.0f} "
            f"| {one['full caches']:.0f} | {one['tokens']:,.0f} | {one['forwards']:.0f} |"
        )
    late = done[len(done) // 2 - 1 :]
    x = np.log([one[axis] for one in late])
    slopes = {
        what: np.polyfit(x, np.log([max(one[what], 1e-9) for one in late]), 1)[0]
        for what in ("seconds", "MiB")
    }
    said = ", ".join(f"{what} {slope:.2f}" for what, slope in slopes.items())
    return ["", *lines, "", f"Slope against {axis}: {said}."]


if __name__ == "__main__":
    main()
