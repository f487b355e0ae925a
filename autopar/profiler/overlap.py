"""How much slower a matmul and an all-reduce get while the other runs.

One of the two is kept running in the background for longer than the other takes; the ratio of that one's time then and
alone is its slowdown (1: none). On a device with a queue the background runs on a stream of its own, on the CPU in a
thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from autopar.profiler.clock import Call, Clock
from autopar.profiler.ranks import largest

MESSAGE = 32 << 20
"""Bytes of the all-reduce."""
MATMUL = {"cpu": 512, "cuda": 8192}
COVER = 2.5
"""How many times as long as the measured work the background runs."""
TRIALS = 5


def overlap_figures(device: torch.device, clock: Clock, group: dist.ProcessGroup) -> dict[str, float]:
    """``overlap.compute`` and ``overlap.communication``: slowdown of each beside the other, on the slowest rank.

    All ranks of the group call it together.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    size = MATMUL[device.type]
    left = torch.ones(size, size, dtype=dtype, device=device)
    message = torch.zeros(MESSAGE // dtype.itemsize, dtype=dtype, device=device)
    aside = _group_like(group, device)  # a group of its own, so that the two never wait in one queue

    def compute() -> object:
        return torch.mm(left, left)

    def communicate(over: dist.ProcessGroup = group) -> None:
        dist.all_reduce(message, group=over)

    one, send = largest([_timed(clock, compute, 5), _timed(clock, communicate, 5)], device)
    # As many matmuls as an all-reduce takes, so that both halves of the experiment are of one length.
    count = max(1, round(send / one))

    def matmuls() -> None:
        for _ in range(count):
            compute()

    (alone,) = largest([_timed(clock, matmuls, TRIALS)], device)
    sends = max(1, round(COVER * alone / send))
    beside = []
    for _ in range(TRIALS):
        dist.barrier(group=group)
        with _background(device, lambda: communicate(aside), sends):
            beside.append(_timed(clock, matmuls, 1))
    (together,) = largest([median(beside)], device)
    beside = []
    for _ in range(TRIALS):
        dist.barrier(group=group)
        with _background(device, matmuls, max(1, round(COVER * send / alone))):
            beside.append(_timed(clock, communicate, 1))
    (sent,) = largest([median(beside)], device)
    return {"overlap.compute": together / alone, "overlap.communication": sent / send}


def _group_like(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    made: dist.ProcessGroup = dist.new_group(dist.get_process_group_ranks(group))
    dist.barrier(group=made)
    return made


def _timed(clock: Clock, call: Call, repeats: int) -> float:
    if repeats > 1:
        call()
    return median(clock.plain_samples([call] * repeats))


@contextlib.contextmanager
def _background(device: torch.device, call: Callable[[], object], count: int) -> Iterator[None]:
    """Run ``call`` so many times beside the body; wait for it at the end."""
    if device.type == "cpu":
        failed: list[BaseException] = []

        def run() -> None:
            try:
                for _ in range(count):
                    call()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield
        thread.join()
        if failed:
            raise failed[0]
        return
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(count):
            call()
    yield
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
