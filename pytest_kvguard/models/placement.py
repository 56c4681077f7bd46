"""Which devices a model goes to, and in which type."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pytest_kvguard.errors import InvalidArgument, Unavailable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
ROOM = 2**30


def check_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is a GPU when there is one.

    Raises InvalidArgument for what is none, and for a GPU that torch does not see.
    """
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"device must be auto, cpu or cuda[:n], got {name!r}")
    if device.type == "cuda":
        _check_gpu(name, device.index or 0)
    return device


def _check_gpu(name: str, index: int) -> None:
    if not torch.cuda.is_available():
        raise InvalidArgument(f"device {name!r} was asked for, but torch sees no GPU; use cpu")
    if index >= (count := torch.cuda.device_count()):
        raise InvalidArgument(
            f"device {name!r} was asked for, but torch sees {count} GPUs; the last is "
            f"cuda:{count - 1}"
        )


def choose_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """Return the type to load weights in: ``auto`` is the checkpoint's on a GPU.

    On a CPU it is float32, in which everything is exact and nothing is slow. Raises
    InvalidArgument for a name that is not in DTYPES.
    """
    if name == AUTO:
        return AUTO if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InvalidArgument(f"dtype must be one of {', '.join([AUTO, *DTYPES])}, got {name!r}")
    return DTYPES[name]


def spread(
    place: str,
    extra: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype | str,
    room: int = ROOM,
) -> dict[str, Any] | None:
    """Return what tells transformers to load a model over all GPUs, or None if one will do.

    room: bytes that weights must leave free on a GPU, for caches and logits. One will do when the
    model fits, when there is only one, or when the device names it (``cuda:1``). Raises
    Unavailable for a model that all of them together cannot hold.
    """
    if device.type != "cuda" or device.index is not None or torch.cuda.device_count() < 2:
        return None
    free = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())}
    budget = {gpu: max(0, there - room) for gpu, there in free.items()}
    size, packed = _size(place, extra, dtype)
    if size <= budget[0]:
        return None
    if size > sum(budget.values()) and not packed:
        raise Unavailable(
            f"the weights take {size / 2**30:.1f} GiB, but the {len(free)} GPUs have "
            f"{sum(budget.values()) / 2**30:.1f} GiB for them (what is free, less "
            f"{room / 2**30:.1f} GiB each for caches and logits); use a smaller --kv-dtype, a "
            f"quantized checkpoint, more GPUs or --kv-device=cpu"
        )
    return {"device_map": AUTO, "max_memory": budget}  # without "cpu": nothing is offloaded


def _size(place: str, extra: Mapping[str, Any], dtype: torch.dtype | str) -> tuple[int, bool]:
    """Return the bytes of a model's weights, and whether they are packed and take fewer."""
    config = AutoConfig.from_pretrained(place, **extra)
    if not isinstance(dtype, torch.dtype):
        named = getattr(config, "dtype", None)
        dtype = named if isinstance(named, torch.dtype) else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = [*model.parameters(), *model.buffers()]
    packed = getattr(config, "quantization_config", None) is not None
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors), packed
