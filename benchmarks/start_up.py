"""What starting costs: ``python benchmarks/start_up.py``.

Two things, each against its price without us, in turn: a pytest run that has nothing to do with
key-value caches, with the plugin and without; and the time from the command to the first answer
of the default model, of which importing torch and transformers is the largest part.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

SUITES = Path(__file__).parents[1] / "suites"
UNRELATED = "def test_it():\n    assert True\n"
FACTS = SUITES / "world_knowledge" / "test_world_knowledge.py"
FIRST = [f"{FACTS}::test_facts", "--kv-policy=snapkv", "--ratio=0.5", "--kv-limit=1"]


def main() -> None:
    """Run the commands in turn and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=11)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        Path(folder, "test_it.py").write_text(UNRELATED)
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        commands = {
            "unrelated run, without the plugin": [*pytest, "-p", "no:kvguard", folder],
            "unrelated run, with the plugin": [*pytest, folder],
            "import torch, transformers' Llama": [
                sys.executable,
                "-c",
                "import torch; from transformers import AutoTokenizer, LlamaForCausalLM",
            ],
            "one sample of facts, all of the command": [*pytest, *FIRST],
        }
        for command in commands.values():  # fills caches of files
            seconds(command)
        rounds = [
            {name: seconds(each) for name, each in commands.items()} for _ in range(args.runs)
        ]
    print(f"| command | seconds, median of {args.runs} |\n|---|--:|")
    for name in commands:
        print(f"| {name} | {median(one[name] for one in rounds):.3f} |")
    without, with_plugin, imports, first = commands
    added = median(one[with_plugin] - one[without] for one in rounds)
    ours = median(one[first] - one[imports] for one in rounds)
    print(f"\nThe plugin adds {1000 * added:.0f} ms; a first sample {ours:.1f} s to the imports.")


def seconds(command: list[str]) -> float:
    """Time a command; its exit status may say that a test failed, nothing worse."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode > 1:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
