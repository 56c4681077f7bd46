"""What a compressed cache costs while it answers: ``python benchmarks/evicted.py``.

After the latency tables of KVFundaBench (Liu et al., 2025, https://arxiv.org/abs/2502.01941; 5
and 15): a long prompt is read once, compressed, and a long answer decoded from what is left, full
cache and policies side by side. Seconds are of decoding alone. Energy is read from NVML on a GPU
and from RAPL on a CPU that lets us; elsewhere it is "not measured".
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from pytest_kvguard.kv.compress import importances, keep_masks
from pytest_kvguard.kv.decode import Answer, Draft, Stopping, greedy
from pytest_kvguard.kv.grid import Cell, Prompt
from pytest_kvguard.kv.jobs import HeldPrompt, Job, kept_of
from pytest_kvguard.kv.layers import layers_of
from pytest_kvguard.kv.prefill import About, Observe, prefill
from pytest_kvguard.kv.rope import find_rotation
from pytest_kvguard.kv.rows import Rows
from pytest_kvguard.kv.seam import Seam
from pytest_kvguard.models import Loaded, load
from pytest_kvguard.policies import get_policy
from pytest_kvguard.policies.full import full

RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


@dataclass(frozen=True)
class Cost:
    """What decoding one answer took."""

    seconds: float
    joules: float | None
    first: int  # bytes of keys and values before the first token
    last: int  # and after the last


def main() -> None:
    """Measure the full cache and every policy asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="reasoner")
    parser.add_argument("--policies", default="streaming_llm,h2o,tova,snapkv,pyramidkv,shotkv")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens read")
    parser.add_argument("--new", type=int, default=256, help="tokens written")
    parser.add_argument("--rows", type=int, default=1, help="prompts decoded together")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load(args.model, dtype=args.dtype)
    names = ["full", *args.policies.split(",")]
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for _ in range(args.runs):  # in turn, so that a busy minute is everybody's
        for name in names:
            costs[name].append(cost(loaded, name, args))
    print(f"{args.model}, {args.rows} x {args.prompt} tokens read, {args.new} written, ", end="")
    print(f"keep ratio {args.ratio:g}, {loaded.model.device}, {args.dtype}")
    print(
        "| policy | ms a token | tokens a second | times full | KV MiB first | last | J a token |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    tokens = args.rows * args.new
    for name in names:
        seconds = median(one.seconds for one in costs[name])
        against = median(
            a.seconds / b.seconds for a, b in zip(costs[name], costs["full"], strict=True)
        )
        spent = [one.joules for one in costs[name] if one.joules is not None]
        energy = f"{median(spent) / tokens:.4f}" if spent else "not measured"
        one = costs[name][0]
        print(
            f"| {name} | {1000 * seconds / args.new:.2f} | {tokens / seconds:.0f} | {against:.2f} "
            f"| {one.first / 2**20:.1f} | {one.last / 2**20:.1f} | {energy} |"
        )


@torch.inference_mode()
def cost(loaded: Loaded, name: str, args: argparse.Namespace) -> Cost:
    """Read prompts, compress them, and time the decoding of their answers."""
    seam = Seam(loaded.model)
    stopping = Stopping(args.new, frozenset(), (), loaded.decode)
    cells = [Cell(full(), 1.0) if name == "full" else Cell(get_policy(name), args.ratio)]
    prompts = [random_prompt(loaded, args.prompt, seed) for seed in range(args.rows)]
    rotation = find_rotation(seam) if cells[0].policy.rerotate else None
    with seam.open():
        jobs = [read(seam, index, prompt, cells[0]) for index, prompt in enumerate(prompts)]
        make = layers_of(jobs, cells, args.new, rotation)
        rows = Rows([kept_of(job, rotation) for job in jobs], make)
        first = sum(rows.bytes)
        del jobs  # and with them the prefills
        answers = [Answer() for _ in prompts]
        wait(loaded)
        meter, began = joules(loaded), time.perf_counter()
        greedy(seam, rows, [prompt.tail for prompt in prompts], answers, stopping)
        wait(loaded)
        seconds = time.perf_counter() - began
        now = joules(loaded)
    spent = None if meter is None or now is None else now - meter
    return Cost(seconds, spent, first, sum(rows.bytes))


def read(seam: Seam, index: int, prompt: Prompt, cell: Cell) -> Job:
    """Prefill a prompt and choose what its cell keeps of it."""
    policy = cell.policy
    observe = Observe(policy.window, policy.needs_sums)
    held = HeldPrompt(index, prompt, prefill(seam, prompt.ids, observe))
    states = held.prefill.states(prompt.about, prompt.protection(policy, seam.device))
    masks = keep_masks(policy, importances(policy, states), states, cell.ratio)
    budgets = [policy.budget(state, cell.ratio) for state in states]
    return Job(held, Draft([], torch.empty(0)), 0, masks, budgets)


def random_prompt(loaded: Loaded, length: int, seed: int) -> Prompt:
    """Draw tokens, in units of fifty for policies that keep units."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, loaded.model.config.vocab_size, (length,), generator=generator)
    units = tuple((range(at, at + 50),) for at in range(0, length - 60, 50))
    return Prompt(tuple(ids.tolist()), context=0, about=About(units=units))


def wait(loaded: Loaded) -> None:
    """Let a GPU finish what it was given."""
    if loaded.model.device.type == "cuda":
        torch.cuda.synchronize()


def joules(loaded: Loaded) -> float | None:
    """Read the energy meter of where the model is; None where there is none to be read."""
    if loaded.model.device.type == "cuda":
        return _nvml()
    try:
        return int(RAPL.read_text()) / 1e6
    except OSError:
        return None


def _nvml() -> float | None:
    try:
        import pynvml
    except ImportError:
        return None
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


if __name__ == "__main__":
    main()
