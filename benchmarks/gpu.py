"""What the engine makes of a GPU: ``python benchmarks/gpu.py``.

Nothing is downloaded: the model has a named shape and random weights. Two tables, each beside what
the memory's bandwidth allows at best (weights and keys and values, read once a step):

grid    every policy at every ratio over the same prompts, against the baseline alone and against
        ``generate()`` once per cell
decode  what a step takes when answers are written from what a policy keeps, against
        ``generate()`` with a static cache; the rows of the grid, all together, are among them

Random weights are the worst case for a grid: an answer leaves its draft at the first token that
was evicted for nothing. On a CPU ``--shape tiny`` shows in seconds what it will look like.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from decoding import FULL, Decoded, cell_of, decode, endless, random_prompts
from meters import bandwidth, forget_peak, joules, peak, wait
from rich.console import Console
from shapes import SHAPES, model_of, read_bytes
from tables import Report, Row, markdown, show

from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.grid import Cell, Prompt
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.models import DTYPES


class Bench:
    """A model on a device, a clock that runs out, and what was measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.ends = args, time.monotonic() + 60 * args.minutes
        self.device = torch.device(args.device)
        self.model = model_of(args.shape, self.device, DTYPES[args.dtype])
        self.hook = AttentionHook(self.model)
        self.weights = read_bytes(self.model)
        self.bandwidth = bandwidth(self.device)
        self.cells = [
            cell_of(name, ratio) for name in split(args.policies) for ratio in numbers(args.ratios)
        ]
        cuda = self.device.type == "cuda"
        self.report = Report(
            vars(args)
            | {
                "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "bandwidth_bytes_a_second": self.bandwidth,
                "weight_bytes_a_step": self.weights,
            }
        )

    def prompts(self, count: int, length: int) -> list[Prompt]:
        """Draw prompts of random tokens."""
        return random_prompts(count, length, self.hook.vocabulary)

    def roofline(self, kv: float) -> float:
        """Return the seconds of a step that reads the weights and ``kv`` bytes at best."""
        return (self.weights + kv) / self.bandwidth

    def trying(self, what: str, measure: Callable[[], Row]) -> Row | None:
        """Measure while there is time; say what was left out, and why."""
        if time.monotonic() > self.ends:
            self.report.left_out.append(f"{what}: the time was up")
            return None
        try:
            return measure()
        except torch.OutOfMemoryError:
            self.report.left_out.append(f"{what}: out of memory")
        finally:
            forget_peak(self.device)
        return None

    def grid(self) -> None:
        """Measure the grid, the baseline alone and `generate()`, in turn, and again."""
        args = self.args
        prompts = self.prompts(args.prompts, args.length)
        sides: dict[str, Callable[[int], Row]] = {
            "baseline alone": lambda new: self.ours(prompts, [], new),
            f"grid of {len(self.cells)} cells": lambda new: self.ours(prompts, self.cells, new),
            "generate()": lambda new: self.generate(prompts, new),
        }
        done: dict[str, list[Row]] = {name: [] for name in sides}
        for run in range(args.runs + 1):  # the first is for practice
            for name, measure in sides.items():
                row = self.trying(f"{name}, run {run}", lambda measure=measure: measure(args.new))
                if row is not None:
                    done[name].append(row)
        for name, rows in done.items():
            if rows:
                first, later = rows[0], rows[1:] or rows
                seconds = median(row["seconds"] for row in later)
                self.report.grid.append(later[0] | {
                    "side": name, "seconds": seconds, "first_seconds": first["seconds"],
                })  # fmt: skip
        self._compare()

    def _compare(self) -> None:
        """Add how many baselines, and how many times `generate()` once per cell, each took."""
        seconds = {row["side"]: row["seconds"] for row in self.report.grid}
        once = seconds.get("generate()", 0.0) * len(self.cells)
        if once:
            self.report.grid.append({"side": "generate() once per cell", "seconds": once})
        for row in self.report.grid:
            if base := seconds.get("baseline alone"):
                row["baselines"] = row["seconds"] / base
            if once:
                row["faster_than_generate_per_cell"] = once / row["seconds"]

    def ours(self, prompts: Sequence[Prompt], cells: Sequence[Cell], new: int) -> Row:
        """Run a grid on an engine of its own, which has answered nothing before."""
        engine, hook = Engine(self.hook), self.hook
        forwards, tokens = hook.forwards, hook.tokens
        forget_peak(self.device)
        meter, began = joules(self.device), time.perf_counter()
        grid = engine.run(prompts, cells, endless(new))
        wait(self.device)
        row = self.spent(began, meter)
        problems = [outcome.problem for outcome in grid.cells.values() if outcome.problem]
        if problems:
            raise SystemExit(f"cells that could not be run: {problems}")
        tail = hook.tokens - tokens
        return row | {"forwards": hook.forwards - forwards, "tokens": tail}

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], new: int, **settings: Any) -> Row:
        """Let transformers answer the same prompts, all in one batch."""
        ids = torch.tensor([prompt.ids for prompt in prompts], device=self.device)
        forget_peak(self.device)
        meter, began = joules(self.device), time.perf_counter()
        written = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            **settings,
        )
        wait(self.device)
        assert written.shape[1] == ids.shape[1] + new
        return self.spent(began, meter) | {"forwards": new}

    def spent(self, began: float, meter: float | None) -> Row:
        """Return what was spent since then."""
        seconds, now = time.perf_counter() - began, joules(self.device)
        used = None if meter is None or now is None else now - meter
        return {"seconds": seconds, "joules": used, "peak_bytes": peak(self.device)}

    def decode(self) -> None:
        """Measure decoding under every policy, and the grid's rows together."""
        args = self.args
        names = [FULL, *split(args.decode_policies)]
        for length in integers(args.read):
            for rows in integers(args.rows):
                prompts = self.prompts(rows, length)
                self._static(prompts)
                for name in names:
                    self._decode(name, prompts, [cell_of(name, args.decode_ratio)])
        self._decode("the grid's cells", self.prompts(args.prompts, args.length), self.cells)

    def _decode(self, name: str, prompts: Sequence[Prompt], cells: Sequence[Cell]) -> None:
        what = f"{name}, {len(prompts)} x {len(prompts[0].ids)}"

        def measure() -> Row:
            decode(self.hook, prompts[:1], cells, 4)  # for practice
            found: Decoded = decode(self.hook, prompts, cells, self.args.write)
            best = self.roofline(found.read)
            return {
                "policy": name,
                "rows": found.rows,
                "read": len(prompts[0].ids),
                "ms_a_step": 1000 * found.step,
                "ms_a_step_in_all": 1000 * found.seconds / self.args.write,
                "tokens_a_second": found.rows / found.step,
                "roofline_ms": 1000 * best,
                "rooflines": found.step / best,
                "held_first_bytes": found.first,
                "held_last_bytes": found.last,
                "joules_a_token": found.joules and found.joules / found.tokens,
                "peak_bytes": found.peak,
            }

        if (row := self.trying(what, measure)) is not None:
            self.report.decode.append(row)

    def _static(self, prompts: Sequence[Prompt]) -> None:
        """Measure steps of `generate()` with a static cache: a long answer less a short one."""
        rows, length, new = len(prompts), len(prompts[0].ids), self.args.write

        def measure() -> Row:
            settings: Row = {"cache_implementation": "static"}
            try:
                self.generate(prompts, 2, **settings)
            except torch.OutOfMemoryError:
                raise
            except Exception as problem:  # such as no compiler
                self.report.left_out.append(f"generate() compiled: {type(problem).__name__}")
                settings["disable_compile"] = True
            self.generate(prompts, new, **settings)  # for practice
            short = self.generate(prompts, 1, **settings)
            long = self.generate(prompts, new, **settings)
            step = (long["seconds"] - short["seconds"]) / (new - 1)
            kv = self.kv_bytes(rows * (length + new / 2))
            best = self.roofline(kv)
            spent = None if long["joules"] is None else long["joules"] - short["joules"]
            return {
                "policy": "generate(), static cache",
                "rows": rows,
                "read": length,
                "ms_a_step": 1000 * step,
                "tokens_a_second": rows / step,
                "roofline_ms": 1000 * best,
                "rooflines": step / best,
                "held_first_bytes": self.kv_bytes(rows * (length + new)),
                "held_last_bytes": self.kv_bytes(rows * (length + new)),
                "joules_a_token": spent and spent / (rows * (new - 1)),
                "peak_bytes": long["peak_bytes"],
            }

        if (row := self.trying(f"generate(), static, {rows} x {length}", measure)) is not None:
            self.report.decode.append(row)

    def kv_bytes(self, positions: float) -> int:
        """Bytes of the keys and values of so many positions in all layers."""
        config, size = self.model.config, self.model.dtype.itemsize
        heads = config.num_hidden_layers * config.num_key_value_heads
        return int(positions * heads * config.head_dim * 2 * size)


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[float]:
    return [float(part) for part in split(text)]


def integers(text: str) -> list[int]:
    return [int(part) for part in split(text)]


def main() -> None:
    """Measure what was asked for; write it as JSON and Markdown after every table."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b" if cuda else "tiny")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if cuda else "float32")
    parser.add_argument("--parts", default="grid,decode", help="which tables")
    parser.add_argument("--prompts", type=int, default=4, help="of the grid")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a prompt of the grid")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer of the grid")
    parser.add_argument("--policies", default="streaming_llm,knorm,snapkv,tova")
    parser.add_argument("--ratios", default="0.25,0.5,0.75")
    parser.add_argument("--runs", type=int, default=2, help="of the grid, after one for practice")
    parser.add_argument("--rows", default="1,8", help="prompts decoded together")
    parser.add_argument("--read", default="4096,8192", help="tokens of a prompt that is decoded")
    parser.add_argument("--write", type=int, default=256, help="tokens that are decoded")
    parser.add_argument(
        "--decode-policies",
        default="streaming_llm,h2o,tova,shotkv,snapkv,adakv,pyramidkv,quest,kivi,int8,fp8",
    )
    parser.add_argument("--decode-ratio", type=float, default=0.25)
    parser.add_argument("--minutes", type=float, default=30, help="start nothing new after these")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--markdown", type=Path, default=Path("gpu.md"))
    args = parser.parse_args()
    bench = Bench(args)
    for part in split(args.parts):
        {"grid": bench.grid, "decode": bench.decode}[part]()
        args.json.write_text(json.dumps(asdict(bench.report), indent=1, default=str))
        args.markdown.write_text(markdown(bench.report))
    show(bench.report, Console())


if __name__ == "__main__":
    main()
