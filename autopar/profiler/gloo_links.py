"""Measures gloo's collectives over this machine's loopback: seconds per step and bytes/s between two ranks.

The ranks are threads of this process, each with a process group of its own: gloo moves the bytes over TCP all the same,
and nothing has to be launched.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from autopar.profiler.timing import timed

SMALL, LARGE = 1, 1 << 20
"""Elements (float32) of the messages: one to see the latency, 4 MiB to see the bandwidth."""

TIMEOUT = timedelta(seconds=20)

c10d: Any = torch.distributed  # its process group classes have no type stubs


def gloo_link(budget_s: float = 0.15) -> tuple[float, float]:
    """(seconds per step, bytes/s per rank and direction) of an all-reduce between two ranks.

    An all-reduce of V bytes over two ranks takes two steps and moves V bytes per rank.
    Raises RuntimeError when gloo does.
    """
    store = c10d.HashStore()
    found: dict[int, tuple[float, float]] = {}
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = _measure(store, rank, budget_s)
        except BaseException as error:
            failures.append(error)

    ranks = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(3 * TIMEOUT.total_seconds())
    if failures or len(found) < 2:
        raise RuntimeError(f"gloo over loopback: {failures[0] if failures else 'timed out'}")
    small, large = (max(found[rank][i] for rank in range(2)) for i in range(2))
    return small / 2, 4 * LARGE / max(large - small, 1e-9)


def _measure(store: Any, rank: int, budget_s: float) -> tuple[float, float]:
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = TIMEOUT
    group = c10d.ProcessGroupGloo(store, rank, 2, options)
    seconds = []
    for elements in (SMALL, LARGE):
        tensor = torch.ones(elements)
        seconds.append(_paired(group, tensor, budget_s))
    return seconds[0], seconds[1]


def _paired(group: Any, tensor: torch.Tensor, budget_s: float) -> float:
    """Median seconds of an all-reduce; both ranks run it the same number of times, which they agree on first."""

    def reduce() -> None:
        group.allreduce([tensor]).wait()

    once = torch.tensor([timed(reduce, budget_s=0.0, least=3).seconds])
    group.allreduce([once]).wait()
    repeats = int(min(200, max(5, 2 * budget_s / float(once))))
    return timed(reduce, budget_s=0.0, least=repeats).seconds
