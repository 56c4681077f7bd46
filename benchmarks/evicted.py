"""What a compressed cache costs while it answers: ``python benchmarks/evicted.py``.

After the latency tables of KVFundaBench (Liu et al., 2025, https://arxiv.org/abs/2502.01941; 5
and 15): a long prompt is read once, compressed, and a long answer decoded from what is left, full
cache and policies side by side. Seconds are of decoding alone. Energy is read from NVML on a GPU
and from RAPL on a CPU that lets us; elsewhere it is "not measured".
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from pytest_kvguard.kv.compress import Kept, importances, keep, keep_all, keep_masks
from pytest_kvguard.kv.decode import Answer, Stopping, greedy
from pytest_kvguard.kv.evicting import Decoding, evicting
from pytest_kvguard.kv.grid import Cell, Prompt
from pytest_kvguard.kv.prefill import Observe, prefill
from pytest_kvguard.kv.rope import find_rotation
from pytest_kvguard.kv.rows import GrowingLayer, LayerFactory, Rows
from pytest_kvguard.kv.seam import Seam
from pytest_kvguard.models import Loaded, load
from pytest_kvguard.policies import get_policy

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
    prompts = [random_prompt(loaded, args.prompt, seed) for seed in range(args.rows)]
    with seam.open():
        if name == "full":
            observed = [prefill(seam, prompt.ids, Observe()) for prompt in prompts]
            kept: list[Kept] = [keep_all(one, args.prompt - 1) for one in observed]
            make: LayerFactory = GrowingLayer
        else:
            cell = Cell(get_policy(name), args.ratio)
            kept, make = compressed(seam, cell, prompts, args.new)
        rows = Rows(kept, make)
        first = sum(one.bytes for one in kept)
        del kept
        answers = [Answer() for _ in prompts]
        wait(loaded)
        meter, began = joules(loaded), time.perf_counter()
        greedy(seam, rows, [prompt.tail for prompt in prompts], answers, stopping)
        wait(loaded)
        seconds = time.perf_counter() - began
        now = joules(loaded)
    last = sum(
        int((layer.positions != -1).sum()) * 2 * layer.keys.shape[-1] * layer.keys.element_size()
        for layer in rows.layers.values()
    )
    spent = None if meter is None or now is None else now - meter
    return Cost(seconds, spent, first, last)


def compressed(
    seam: Seam, cell: Cell, prompts: Sequence[Prompt], new: int
) -> tuple[list[Kept], LayerFactory]:
    """Return what a policy leaves of each prompt, and the layers that go on from it."""
    policy = cell.policy
    rotation = find_rotation(seam) if policy.rerotate else None
    kept, budgets = [], [0]
    for prompt in prompts:
        held = prefill(seam, prompt.ids, Observe(policy.window, policy.needs_sums))
        states = held.states(prompt.about, prompt.protection(policy, seam.device))
        masks = keep_masks(policy, importances(policy, states), states, cell.ratio)
        budgets = [policy.budget(state, cell.ratio) for state in states]
        kept.append(keep(held, masks, budgets, prompt.fed, rotation))
    if cell.decode is None:
        return kept, GrowingLayer
    count = len(prompts)
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts], device=seam.device)
    decoding = Decoding(
        eviction=cell.decode,
        ratio=torch.full((count,), cell.decode_ratio, dtype=torch.float64, device=seam.device),
        prompt_length=lengths,
        fresh=lengths,
        slots=cell.decode.slots(max(budgets), new + 1, cell.decode_ratio),
        rotation=rotation,
    )
    return kept, evicting(decoding)


def random_prompt(loaded: Loaded, length: int, seed: int) -> Prompt:
    """Draw tokens, in units of fifty for policies that keep units."""
    from pytest_kvguard.kv.prefill import About

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
