"""What starting costs: ``python benchmarks/start_up.py``.

Two things, each against its price without us, in turn: a pytest run that has nothing to do with
key-value caches, with the plugin and without; and the time from the command to the first sample
of the default model, answered by the full cache and by a compressed one and judged, of which
importing torch and transformers is the largest part.
"""

import argparse
import os
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
STAMP = """
import os, pathlib, time

def pytest_runtest_logreport(report):
    if report.when == "setup":  # its fixture has measured the cell
        pathlib.Path(os.environ["STAMP"]).write_text(str(time.time()))
"""


def main() -> None:
    """Run the commands in turn and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=11)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        Path(folder, "test_it.py").write_text(UNRELATED)
        Path(folder, "stamp.py").write_text(STAMP)
        rounds = [once(Path(folder)) for _ in range(args.runs + 1)][1:]  # the first fills caches
    print(f"| command | seconds, median of {args.runs} |\n|---|--:|")
    for name in rounds[0]:
        print(f"| {name} | {median(one[name] for one in rounds):.3f} |")
    without, with_plugin, imports, first, _ = rounds[0]
    added = median(one[with_plugin] - one[without] for one in rounds)
    ours = median(one[first] - one[imports] for one in rounds)
    print(f"\nThe plugin adds {1000 * added:.0f} ms; a first sample {ours:.1f} s to the imports.")


def once(folder: Path) -> dict[str, float]:
    """Time each command once."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    imports = "import torch; from transformers import AutoTokenizer, LlamaForCausalLM"
    stamp = folder / "stamp"
    taken = {
        "unrelated run, without the plugin": seconds([*pytest, "-p", "no:kvguard", str(folder)]),
        "unrelated run, with the plugin": seconds([*pytest, str(folder)]),
        "import torch, transformers' Llama": seconds([sys.executable, "-c", imports]),
    }
    began = time.time()
    whole = seconds([*pytest, "-p", "stamp", *FIRST], PYTHONPATH=str(folder), STAMP=str(stamp))
    taken["one sample of facts, until it is judged"] = float(stamp.read_text()) - began
    taken["one sample of facts, all of the command"] = whole
    return taken


def seconds(command: list[str], **environment: str) -> float:
    """Time a command; its exit status may say that a test failed, nothing worse."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode > 1:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
