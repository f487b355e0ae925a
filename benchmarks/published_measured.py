"""What was measured of a published run: seconds of a step and bytes, and which ones a source counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from published_stacks import EARLY
from published_tidy import Record, RefusedError

from autopar.cluster import Device
from autopar.stack import Stack

PYTORCH_WORKSPACES, DETERMINISTIC_BYTES = 2, 8 * 4 * 2**20
"""PyTorch's own workspaces (of the thread that runs forwards, and of autograd's), and bytes of one where runs are
deterministic."""


def seconds(record: Record) -> float | None:
    """Measured seconds of a step, from the throughput where that alone is given."""
    measured = record["measured"]
    if measured.get("step_time_s"):
        return float(measured["step_time_s"])
    if not measured.get("tokens_per_s_per_gpu"):
        return None
    tokens = stated(record, "global_batch") * stated(record["model"], "seq_len")
    return float(tokens / (measured["tokens_per_s_per_gpu"] * devices_of(record)))


def peak_bytes(record: Record) -> float | None:
    """Measured bytes of the fullest device: sources say GB and mean GiB, as PyTorch and nvidia-smi count."""
    found = record["measured"].get("peak_mem_gb")
    return float(found) * 2**30 if found else None


def workspace_bytes(record: Record, device: Device, stack: Stack) -> float:
    """Bytes of workspaces of matmul libraries, as `Stack.workspaces` counts them. Deterministic runs ask for eight
    chunks of 4 MiB for each of PyTorch's (CUBLAS_WORKSPACE_CONFIG=:4096:8, as PyTorch's notes on randomness say)."""
    each = max(DETERMINISTIC_BYTES, device.workspace_bytes) if record.get("deterministic") else device.workspace_bytes
    return PYTORCH_WORKSPACES * each + (stack.workspaces - PYTORCH_WORKSPACES) * device.workspace_bytes


def counted_by(record: Record) -> str:
    """What counted the bytes: PyTorch those "allocated", its allocator those "reserved" (torchtitan), or the "driver",
    beside those what the process holds outside the allocator (nvidia-smi: BLOOM's of bigscience)."""
    told = record.get("notes") or ""
    if re.search(r"(?<!not )nvidia-smi", told) or "bigscience" in str(record.get("group")).lower():
        return "driver"
    return "reserved" if "reserved" in told else "allocated"


def held_by(record: Record, ranks: Sequence[int]) -> int:
    """Of the bytes of all pipeline ranks those that were measured: Megatron's CI logs the last one's
    (`shared/published/README.md`), who names none reports the fullest."""
    return ranks[-1] if str(record.get("group")).startswith("megatron_ci") else max(ranks)


def counts_recomputation(record: Record) -> bool:
    """Whether FLOP/s count what is recomputed (papers on Megatron until 2022; `shared/published/README.md`, trap 1)."""
    told = " ".join(str(record.get(name) or "") for name in ("group", "source", "notes")).lower()
    again = str(record.get("recompute")).lower() in ("full", "true", "block", "uniform")
    return again and bool(re.search(r"hardware flop|incl\. recompute|bigscience|mt-?nlg|" + EARLY, told))


def devices_of(record: Record) -> int:
    """How many devices ran; where that is not stated, the fewest whole nodes that the split of the model fills."""
    hardware = record["hardware"]
    if hardware.get("count"):
        return int(hardware["count"])
    needed = 1
    for name in ("tp", "pp", "cp", "dp"):
        needed *= record.get(name) or 1
    node = stated(hardware, "gpus_per_node")
    return int(-(-needed // node) * node)


def stated(facts: Mapping[str, Any], name: str) -> Any:
    if not facts.get(name):
        raise RefusedError(f"{name} is not stated")
    return facts[name]
