"""What a compressed cache costs while it answers: ``python benchmarks/evicted.py``.

After the latency tables of KVFundaBench (Liu et al., 2025, https://arxiv.org/abs/2502.01941; 5
and 15): a long prompt is read once, compressed, and a long answer decoded from what is left, full
cache and policies side by side. Seconds are of decoding alone. Energy is read from NVML on a GPU
and from RAPL on a CPU that lets us; elsewhere it is "not measured".
"""

import argparse
from statistics import median

import torch
from decoding import FULL, Decoded, cell_of, decode, random_prompts

from pytest_kvguard.engine.model import AttentionHook
from pytest_kvguard.models import load


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
    hook = AttentionHook(loaded.model)
    prompts = random_prompts(args.rows, args.prompt, hook.vocabulary)
    names = [FULL, *args.policies.split(",")]
    found: dict[str, list[Decoded]] = {name: [] for name in names}
    for _ in range(args.runs):  # in turn, so that a busy minute is everybody's
        for name in names:
            found[name].append(decode(hook, prompts, [cell_of(name, args.ratio)], args.new))
    print(f"{args.model}, {args.rows} x {args.prompt} tokens read, {args.new} written, ", end="")
    print(f"keep ratio {args.ratio:g}, {hook.device}, {args.dtype}")
    print(
        "| policy | ms a token | tokens a second | times full | KV MiB first | last | J a token |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in names:
        seconds = median(one.seconds for one in found[name])
        against = median(
            a.seconds / b.seconds for a, b in zip(found[name], found[FULL], strict=True)
        )
        one = found[name][0]
        spent = [each.joules for each in found[name] if each.joules is not None]
        energy = f"{median(spent) / one.tokens:.4f}" if spent else "not measured"
        print(
            f"| {name} | {1000 * seconds / args.new:.2f} | {one.tokens / seconds:.0f} "
            f"| {against:.2f} | {one.first / 2**20:.1f} | {one.last / 2**20:.1f} | {energy} |"
        )


if __name__ == "__main__":
    main()
