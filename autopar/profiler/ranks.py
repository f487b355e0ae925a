"""What all ranks agree on: figures of which the slowest, or the scarcest, rank decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each value on any rank, which all ranks ask for together."""
    found = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [float(value) for value in found]
