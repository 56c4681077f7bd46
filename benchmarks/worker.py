"""One side of the comparison in a process of its own; writes what it did as JSON.

python benchmarks/worker.py ours --cells 12 --out ours.json
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pairs import NAMES, RATIOS, Pair, pairs

from pytest_kvguard.engine.engine import Engine
from pytest_kvguard.engine.grid import Cell, Prompt, Stopping
from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.harness.encode import encode
from pytest_kvguard.models import Loaded, load
from pytest_kvguard.policies.budgets import share
from pytest_kvguard.tasks import get_task

SIDES = ("ours", "ours_baseline", "kvpress", "kvpress_baseline", "generate")
WORDS = {"smollm2-135m": 470, "reasoner": 0}  # of a retrieval context; 0: the model's own task


def main() -> None:
    """Load the model, do the side's work once for practice and once for the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cells", type=int, default=12, choices=sorted(RATIOS))
    parser.add_argument("--only", type=int, help="the index of one cell to run instead of all")
    parser.add_argument("--contexts", type=int, default=2)
    parser.add_argument("--words", type=int, help="words in a context")
    parser.add_argument("--question", type=int, help="tokens of a question, from its end")
    parser.add_argument("--new", type=int, default=24, help="most new tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load(args.model)
    prompts = questions(loaded, args.contexts, args.words)
    if args.question is not None:
        prompts = [replace(p, ids=p.ids[: p.context] + p.tail[-args.question :]) for p in prompts]
    cells = [(name, ratio) for name in NAMES[args.cells] for ratio in RATIOS[args.cells]]
    if args.only is not None:
        cells = [cells[args.only]]
    if args.side.endswith("baseline"):
        cells = []
    work = {"ours": ours, "kvpress": kvpress, "generate": generate}[args.side.partition("_")[0]]
    short = [Prompt(p.ids[:40] + p.ids[p.context :], 40, ahead=True) for p in prompts[:1]]
    work(loaded, short, cells[:1], 2)
    before, cpu = peak(), time.process_time()
    done = work(loaded, prompts, cells, args.new)
    done |= {
        "side": args.side,
        "cpu": time.process_time() - cpu,
        "tokens_in": [len(prompt.ids) for prompt in prompts],
        "peak_before": before,
        "peak": peak(),
    }
    args.out.write_text(json.dumps(done))


def questions(loaded: Loaded, contexts: int, words: int | None) -> list[Prompt]:
    """Make prompts with one question each, to be compressed before the question is seen."""
    words = WORDS.get(loaded.name, 470) if words is None else words
    name = f"retrieval(length={words}, questions_per_context=1)" if words else "retrieval_facts"
    task = get_task(name)
    return encode(task, task.samples[:contexts], loaded.tokenizer, ahead=True)


def peak() -> int:
    """Return the most memory this process has had, bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


Cells = Sequence[tuple[str, float]]


def ours(loaded: Loaded, prompts: Sequence[Prompt], cells: Cells, new: int) -> dict[str, Any]:
    """Run the whole grid, the baseline included, as pytest-kvguard does."""
    made = pairs()
    hook = AttentionHook(loaded.model)
    engine = Engine(hook)
    stopping = Stopping(new, loaded.eos, (), loaded.decode)
    grid_cells = [Cell(made[name].ours, ratio) for name, ratio in cells]
    began = time.perf_counter()
    grid = engine.run(prompts, grid_cells, stopping)
    seconds = time.perf_counter() - began
    outcomes = {"full": grid.baseline} | {
        f"{name}@{ratio:g}": grid.cells[i] for i, (name, ratio) in enumerate(cells)
    }
    problems = {name: outcome.problem for name, outcome in outcomes.items() if outcome.problem}
    if problems:
        raise RuntimeError(f"cells that could not be run: {problems}")
    return {
        "seconds": seconds,
        "forwards": hook.forwards,
        "tokens": hook.tokens,
        "prefills": grid.prefills,
        "answers": {
            name: [outcome.answers[i].tokens for i in range(len(prompts))]
            for name, outcome in outcomes.items()
        },
    }


def kvpress(loaded: Loaded, prompts: Sequence[Prompt], cells: Cells, new: int) -> dict[str, Any]:
    """Run kvpress's own pipeline for the baseline and every cell, with the model kept."""
    import kvpress
    from kvpress.pipeline import KVPressTextGenerationPipeline

    pipeline = KVPressTextGenerationPipeline(model=loaded.model, tokenizer=loaded.tokenizer)
    made = pairs()
    answers: dict[str, list[list[int]]] = {}
    leads: dict[str, list[list[float]]] = {}
    counted = Counter(loaded.model)
    began = time.perf_counter()
    with counted.counting():
        for name, ratio in [("full", 1.0), *cells]:
            label = "full" if name == "full" else f"{name}@{ratio:g}"
            answers[label], leads[label] = [], []
            pair: Pair | None = made.get(name)
            with attention(loaded.model, "eager" if pair and pair.eager else "sdpa"):
                for prompt in prompts:
                    inputs = {
                        "context_ids": torch.tensor([prompt.ids[: prompt.context]]),
                        "questions_ids": [torch.tensor([prompt.ids[prompt.context :]])],
                    }
                    kept = share(prompt.context, ratio) + 0.5  # of all, no less
                    press = pair.press(kvpress, 1 - kept / prompt.context) if pair else None
                    counted.chosen, counted.leads = [], []
                    with torch.inference_mode():
                        pipeline._forward(inputs, max_new_tokens=new, press=press)
                    answers[label].append(counted.chosen)
                    leads[label].append(counted.leads)
    return {
        "seconds": time.perf_counter() - began,
        "forwards": counted.forwards,
        "tokens": counted.tokens,
        "prefills": len(prompts) * (1 + len(cells)),
        "answers": answers,
        "leads": leads,
    }


def generate(loaded: Loaded, prompts: Sequence[Prompt], cells: Cells, new: int) -> dict[str, Any]:
    """Answer with the full cache as transformers does by itself."""
    counted = Counter(loaded.model)
    answers = []
    began = time.perf_counter()
    with counted.counting():
        for prompt in prompts:
            ids = torch.tensor([prompt.ids])
            written = loaded.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=sorted(loaded.eos),
                pad_token_id=min(loaded.eos),
            )
            answers.append(written[0, len(prompt.ids) :].tolist())
    return {
        "seconds": time.perf_counter() - began,
        "forwards": counted.forwards,
        "tokens": counted.tokens,
        "prefills": len(prompts),
        "answers": {"full": answers},
    }


class Counter:
    """Counts what goes through a model, and notes what greedy decoding chooses, how clearly."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.forwards = 0
        self.tokens = 0
        self.chosen: list[int] = []
        self.leads: list[float] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Watch the model for one block."""
        hooks = [
            self.model.model.register_forward_pre_hook(self._count, with_kwargs=True),
            self.model.register_forward_hook(self._note),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.forwards += 1
        ids = kwargs.get("input_ids")
        self.tokens += (args[0] if ids is None else ids).numel()

    def _note(self, module: Any, args: Any, output: Any) -> None:
        best = output.logits[0, -1].topk(2)
        self.chosen.append(int(best.indices[0]))
        self.leads.append(float(best.values[0] - best.values[1]))


@contextmanager
def attention(model: Any, kind: str) -> Iterator[None]:
    """Use one of transformers' attention implementations for one block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(kind)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


if __name__ == "__main__":
    main()
