"""What benchmarks read off a machine: bandwidth, energy, peak memory."""

import time
from pathlib import Path
from statistics import median

import torch

RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


def wait(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, runs: int = 20) -> float:
    """Measure how many bytes a second a large copy on the device reads and writes."""
    size = 2**26
    if device.type == "cuda":
        size = min(2**32, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(runs):
        wait(device)
        began = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / median(seconds[runs // 4 :])


def joules(device: torch.device) -> float | None:
    """Read the energy meter of a device; None where there is none to be read."""
    if device.type == "cuda":
        return _nvml(device)
    try:
        return int(RAPL.read_text()) / 1e6
    except OSError:
        return None


def _nvml(device: torch.device) -> float | None:
    try:
        import pynvml  # of nvidia-ml-py
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{_uuid(device)}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:  # such as a part of a GPU, or an old one
        return None


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def forget_peak(device: torch.device) -> None:
    """Begin to measure peak memory anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Return the most bytes tensors took on a GPU since `forget_peak`; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
