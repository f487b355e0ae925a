"""Measures gloo's collectives over this machine's loopback: seconds per step and bytes/s per rank.

The ranks are threads of this process, each with a process group of its own: gloo moves the bytes over TCP all the same,
and nothing has to be launched.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed

from autopar.profiler.timing import Timing, timed

SMALL, LARGE = 1, 1 << 20
"""Elements (float32) of the messages: one to see the latency, 4 MiB to see the bandwidth."""

TIMEOUT = timedelta(seconds=20)

c10d: Any = torch.distributed  # its process group classes have no type stubs


def gloo_link(ranks: int, budget_s: float = 0.15) -> tuple[float, float]:
    """(seconds per step, bytes/s per rank and direction) of an all-reduce over so many ranks at once.

    An all-reduce of V bytes over n ranks takes 2(n-1) steps and moves 2V(n-1)/n bytes per rank.
    Raises RuntimeError when gloo does.
    """
    store = c10d.HashStore()
    found: dict[int, tuple[float, float, float]] = {}
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = _measure(store, rank, ranks, budget_s)
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(3 * TIMEOUT.total_seconds())
    if failures or len(found) < ranks:
        raise RuntimeError(f"gloo over loopback: {failures[0] if failures else 'timed out'}")
    usual, small, large = (median(found[rank][i] for rank in range(ranks)) for i in range(3))
    moved = 2 * (ranks - 1) / ranks * 4 * LARGE
    return usual / (2 * (ranks - 1)), moved / max(large - small, 0.1 * large)


def _measure(store: Any, rank: int, ranks: int, budget_s: float) -> tuple[float, float, float]:
    """Median seconds of a small all-reduce (waking up is part of its latency), least of a small and of a large one."""
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = TIMEOUT
    group = c10d.ProcessGroupGloo(store, rank, ranks, options)
    small, large = (_reduced(group, torch.ones(elements), budget_s) for elements in (SMALL, LARGE))
    return small.seconds, small.least, large.least


def _reduced(group: Any, tensor: torch.Tensor, budget_s: float) -> Timing:
    """Time an all-reduce; all ranks run it the same number of times, which they agree on first."""

    def reduce() -> None:
        group.allreduce([tensor]).wait()

    once = torch.tensor([timed(reduce, budget_s=0.0, least=3).seconds])
    group.allreduce([once]).wait()
    repeats = int(min(200, max(7, budget_s * group.size() / float(once))))
    return timed(reduce, budget_s=0.0, least=repeats)
