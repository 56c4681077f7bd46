"""Measure the same grid here and in kvpress: ``python benchmarks/against_kvpress.py --cells 12``.

Builds an environment that both can share on first use (kvpress pins transformers), then runs the
sides in turn, each in a fresh process, on the same prompts with the same policies, ratios and
greedy decoding, query-agnostic. Opponents: kvpress's pipeline in one process with the model kept;
one process per cell, as kvpress's own scripts do; generate() without compression. Fails when an
answer differs, other than by a tie that rounding decides.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("worker.py")
TIE = 1e-3  # logits; a first choice that leads by less may be another by rounding alone
Done = dict[str, Any]


def main() -> None:
    """Read the command line, run the sides in turn and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="or reasoner, which ships")
    parser.add_argument("--cells", type=int, default=12, choices=(12, 48))
    parser.add_argument("--contexts", type=int, default=2)
    parser.add_argument("--words", type=int, help="words in a context")
    parser.add_argument("--question", type=int, help="tokens of a question, from its end")
    parser.add_argument("--new", type=int, default=24, help="most new tokens")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", action="store_true", help="also one process per cell")
    parser.add_argument("--env", type=Path, default=ROOT / ".venv-peers")
    args = parser.parse_args()
    side = Side(environment(args.env), args)
    rounds = [
        {name: side.run(name) for name in ("ours", "kvpress", "ours_baseline", "generate")}
        for _ in range(args.runs)
    ]
    differing = [line for done in rounds for line in differences(done["ours"], done["kvpress"])]
    first = rounds[0]["ours"]
    print(f"{args.model}, {args.contexts} prompts of {first['tokens_in']} tokens, at most ", end="")
    print(f"{args.new} new, {args.cells} cells and the baseline, {args.threads} threads")
    for line in table(rounds):
        print(line)
    if args.processes:
        alone = [side.process_seconds("kvpress", cell) for cell in range(args.cells)]
        ours = side.process_seconds("ours")
        print(
            f"one process per cell, kvpress: {sum(alone):.1f} s for {args.cells} processes; ",
            end="",
        )
        print(f"one process, ours: {ours:.1f} s; {sum(alone) / ours:.1f} times")
    ties = [line for line in differing if line.startswith("tie")]
    print(f"answers: {len(differing)} differ, {len(ties)} of them by a tie")
    for line in differing:
        print(f"  {line}")
    sys.exit(len(ties) < len(differing))


def environment(folder: Path) -> Path:
    """Return the Python of an environment with both sides in it, made on first use."""
    if not (folder / "ready").exists():
        subprocess.run(["make", "-C", str(ROOT), f"PEERS={folder}", f"{folder}/ready"], check=True)
    return folder / "bin" / "python"


class Side:
    """Starts workers."""

    def __init__(self, python: Path, args: argparse.Namespace) -> None:
        self.command = [str(python), str(WORKER)]
        self.settings = [
            f"--model={args.model}", f"--cells={args.cells}", f"--contexts={args.contexts}",
            f"--new={args.new}", f"--threads={args.threads}",
        ]  # fmt: skip
        for name in ("words", "question"):
            if getattr(args, name) is not None:
                self.settings.append(f"--{name}={getattr(args, name)}")

    def run(self, name: str, *more: str) -> Done:
        """Run one side; return what it wrote."""
        with TemporaryDirectory() as folder:
            out = Path(folder) / "done.json"
            command = [*self.command, name, f"--out={out}", *self.settings, *more]
            done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr}")
            print(".", end="", file=sys.stderr, flush=True)
            result: Done = json.loads(out.read_text())
            return result

    def process_seconds(self, name: str, cell: int | None = None) -> float:
        """Return how long a whole process takes, start and model loading included."""
        began = time.perf_counter()
        self.run(name, *([] if cell is None else [f"--only={cell}"]))
        return time.perf_counter() - began


def differences(ours: Done, theirs: Done) -> list[str]:
    """Say where answers differ, and by how little the choice was made that differs."""
    lines = []
    for cell, answers in theirs["answers"].items():
        for i, their in enumerate(answers):
            our = ours["answers"][cell][i]
            if our == their:
                continue
            same = [a == b for a, b in zip(our, their, strict=False)]
            at = same.index(False) if False in same else min(len(our), len(their)) - 1
            lead = theirs["leads"][cell][i][at]
            kind = "tie" if lead < TIE else "difference"
            lines.append(f"{kind}: {cell}, prompt {i}, token {at}, lead {lead:.2g}")
    return lines


def table(rounds: list[dict[str, Done]]) -> list[str]:
    """Return a Markdown table of medians; ratios are of pairs that ran after one another."""
    lines = [
        "| side | seconds | times ours | CPU seconds | times ours | tokens | forwards | prefills "
        "| peak MiB above the model |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, label in LABELS.items():
        done = [one[name] for one in rounds]
        ratio = median(one[name]["seconds"] / one["ours"]["seconds"] for one in rounds)
        work = median(one[name]["cpu"] / one["ours"]["cpu"] for one in rounds)
        above = median(one["peak"] - one["peak_before"] for one in done) / 2**20
        lines.append(
            f"| {label} | {median(one['seconds'] for one in done):.2f} | {ratio:.2f} "
            f"| {median(one['cpu'] for one in done):.2f} | {work:.2f} "
            f"| {done[0]['tokens']} | {done[0]['forwards']} | {done[0]['prefills']} "
            f"| {above:.0f} |"
        )
    return lines


LABELS = {
    "ours": "pytest-kvguard, the grid",
    "kvpress": "kvpress pipeline, one process",
    "ours_baseline": "pytest-kvguard, baseline alone",
    "generate": "generate(), baseline alone",
}

if __name__ == "__main__":
    main()
