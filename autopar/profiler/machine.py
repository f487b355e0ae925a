"""What a profile says of the device it is of."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import torch

from autopar.errors import BadInputError
from autopar.profiler.cpu import cache_bytes, machine_name, usable_cores, usable_memory


def device_of(name: str) -> torch.device:
    """The torch device called ``name`` ("cpu", "cuda", "cuda:1"). Raises BadInputError if it is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInputError(f"--device {name}: not a torch device; cpu and cuda are measured") from error
    if device.type not in ("cpu", "cuda"):
        raise BadInputError(f"--device {name}: only cpu and cuda are measured")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BadInputError(f"--device {name}: torch finds no such device here; use --device cpu")
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise BadInputError(f"--device {name}: this machine has {torch.cuda.device_count()} of them")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """Name and properties; bytes. The first six tell whether two profiles are of the same device."""
    common = {"torch": torch.__version__, "python": platform.python_version(), "host": platform.node()}
    if device.type == "cpu":
        return {
            "backend": "cpu",
            "name": machine_name(),
            "memory_bytes": usable_memory(),
            "processors": usable_cores(),
            "driver": platform.release(),
            **common,
            "cache_bytes": cache_bytes(),
        }
    found = torch.cuda.get_device_properties(device)
    return {
        "backend": "cuda",
        "name": found.name,
        "memory_bytes": found.total_memory,
        "processors": found.multi_processor_count,
        "driver": _driver(),
        **common,
        "cache_bytes": found.L2_cache_size,
        "capability": [found.major, found.minor],
        "cuda": torch.version.cuda or torch.version.hip or "",
    }


def free_bytes(device: torch.device) -> int:
    """Bytes that buffers may take: 40 % of what is free, since others may use the device too."""
    if device.type == "cpu":
        return int(0.4 * min(usable_memory(), _available()))
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
    return int(0.4 * (torch.cuda.mem_get_info(device)[0] + kept))


def _available() -> int:
    """Bytes of memory that Linux says are available; a quarter of all where it does not."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    return usable_memory() // 4


def _driver() -> str:
    """The driver's version as nvidia-smi tells it; "unknown" without that command (AMD)."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "unknown"
