"""Write docs/formats.md from the storage formats: ``python docs/make_formats.py``.

Bits and bytes are those of tensors that each format makes. The sections are docstrings.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from pages import doc, link, sections, table

from pytest_kvguard.storage import FORMATS
from pytest_kvguard.storage.base import Codec, Storage

PAGE = Path(__file__).with_name("formats.md")
LAYERS, HEADS, SIZE, DTYPE = 32, 8, 128, torch.bfloat16  # Llama-3-8B
FULL = LAYERS * HEADS * 2 * SIZE * DTYPE.itemsize

INTRODUCTION = f"""\
# Storage formats

Written by `python docs/make_formats.py` from the formats themselves: change those, not this page.

A format stands behind any policy, `snapkv|q8_0`, or alone on the full cache, `q8_0` or
`full|q8_0`. All of them start from one prefill in full precision, and what is attended afterwards
is what the codes restore to.

- **bits**: what a number of a head of {SIZE} channels takes, with scales and padding; keys / values
  where they differ
- **bytes**: what a token of Llama-3-8B takes: {LAYERS} layers, {HEADS} key/value heads of {SIZE}
  channels, {FULL:,} in bfloat16. Layers that are left as they are count as such, a residual of
  newest tokens does not
- **ships in**: where it is found under which name. Engines differ in what they do around it, as the
  section says

Not here: the quantized cache of transformers (HQQ, quanto). Whenever its residual is full it
encodes anew all that it holds, which was restored from codes before, in groups that cross tokens
and heads: no token has codes of its own.
"""

LLAMACPP = "llama.cpp `--cache-type-k {0}`, `--cache-type-v {0}`"
SHIPS = {
    "fp8": "near vLLM's `fp8_per_token_head`",
    "fp8_e4m3": "vLLM, SGLang, TensorRT-LLM",
    "fp8_e5m2": "vLLM, SGLang",
    "int8": "LMDeploy `quant_policy=8`",
    "kivi": "its authors' code",
    "llamacpp": "llama.cpp, each type and mix of them",
    **{kind: LLAMACPP.format(kind) for kind in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")},
    "turboquant": "the scheme of vLLM's presets",
    **{
        name: f"vLLM `--kv-cache-dtype {name}`"
        for name in FORMATS
        if name.startswith("turboquant_")
    },
    "mxfp4": "no cache that we know of; SGLang's `fp4_mx_block16` has blocks of 16",
    "nvfp4": "vLLM, SGLang, TensorRT-LLM",
}


def page() -> str:
    """Return the page."""
    head = ("format", "stores", "bits", "bytes", "of bfloat16", "ships in", "source")
    rows = [_row(name, make) for name, make in FORMATS.items()]
    return "\n".join([INTRODUCTION, table(head, rows), *sections(FORMATS)])


def _row(name: str, make: Callable[..., Storage]) -> tuple[str, ...]:
    storage = make()
    keys, values = (_bytes(codec) * 8 / SIZE for codec in (storage.keys, storage.values))
    layers = [storage.of_layer(index, LAYERS) for index in range(LAYERS)]
    size = HEADS * sum(_bytes(layer.keys) + _bytes(layer.values) for layer in layers)
    return (
        link(name, make),
        _stores(make),
        f"{keys:g}" if keys == values else f"{keys:g} / {values:g}",
        f"{size:,.0f}",
        f"{size / FULL:.1%}",
        SHIPS[name],
        _sources(make),
    )


def _stores(make: Callable[..., Storage]) -> str:
    first = doc(make).partition("\n")[0].rstrip(".").partition("; ")[0]
    return first.removeprefix("Store ").replace("``", "`")


def _bytes(codec: Codec) -> float:
    """Bytes of a token of a head."""
    parts = codec.encode(torch.zeros(1, 1, codec.span, SIZE, dtype=DTYPE))
    return sum(part.nbytes for part in parts) / codec.span


def _sources(make: Callable[..., Storage]) -> str:
    """Return links to the addresses a format's module names."""
    found = re.findall(r"https://[^\s,;]+[^\s,;:.]", doc(sys.modules[make.__module__]))
    return ", ".join(f"[{_short(address)}]({address})" for address in dict.fromkeys(found))


def _short(address: str) -> str:
    host, *path = address.removeprefix("https://").removeprefix("www.").split("/")
    if host == "github.com":
        return "#".join([path[1], *path[3:]])  # repository, or repository#pull
    return path[-1] if host == "arxiv.org" else host


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
