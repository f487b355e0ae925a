"""Measures what operators cost on this machine's CPU: matmul and attention rates, bandwidths, cost per call.

The least of the repeats counts: whatever else runs on the machine only ever adds time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from autopar.profiler.timing import timed

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
MATMUL = 512
"""Rows, columns and inner length of the matmul measured: past the ramp of small ones, and milliseconds long."""

MEMORY_COPY, CACHE_COPY = 64 << 20, 1 << 20
"""Bytes to copy: more than the caches of most cores hold, so that memory is measured; and less."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch's operators on ``count`` threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matmul_flops(dtype: torch.dtype, budget_s: float = 0.12) -> float:
    """FLOP/s of a square matmul."""
    left, right = (torch.ones(MATMUL, MATMUL, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        seconds = timed(lambda: left @ right, budget_s, least=3).least
    return 2 * MATMUL**3 / seconds


def attention_flops(budget_s: float = 0.12) -> float:
    """FLOP/s of causal float32 attention, counting the half that a causal mask leaves."""
    heads, length, head_dim = 4, 512, 64
    query = torch.ones(1, heads, length, head_dim)
    with torch.no_grad():
        seconds = timed(
            lambda: F.scaled_dot_product_attention(query, query, query, is_causal=True), budget_s, least=3
        ).least
    return 2 * heads * length * length * head_dim / seconds


def copy_bandwidth(size: int, budget_s: float = 0.12) -> float:
    """Bytes/s read and written by copying ``size`` bytes again and again."""
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), budget_s, least=3).least


def call_seconds(budget_s: float = 0.1) -> float:
    """Seconds one operator costs however small, autograd's record included."""
    x = torch.ones(16, requires_grad=True)
    chain = 20

    def calls() -> None:
        y = x
        for _ in range(chain):
            y = y * 1.0

    return timed(calls, budget_s).least / chain
