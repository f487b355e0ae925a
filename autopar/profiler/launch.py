"""What an operator costs however small it is: the device's part and the host's, measured apart.

    launch.kernel_s     device seconds from the start of one small kernel to the start of the next, queue filled ahead
    launch.eager_s      host seconds to call one operator as a line of Python (autograd's record included)
    launch.graph_s      the same operators replayed as one CUDA graph, seconds for each (cuda)
    launch.compiled_s   host seconds for each when `torch.compile` has made one function of them (cuda)

On the CPU both of the first two are the time of a call; nothing is captured or compiled there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch

from autopar.profiler.clock import Clock

KERNEL = "launch.kernel_s"
CHAIN = 64
"""Operators in a row."""


def launch_figures(device: torch.device, clock: Clock) -> dict[str, float]:
    """The figures above, in seconds."""
    x = torch.ones(16, device=device)
    trained = torch.ones(16, device=device, requires_grad=True)

    def chain(start: torch.Tensor) -> torch.Tensor:
        for _ in range(CHAIN):
            start = start * 1.0
        return start

    chain(trained)
    figures = {"launch.eager_s": min(clock.host_seconds([lambda: chain(trained)]) for _ in range(20)) / CHAIN}
    samples = sorted(clock.device_samples([lambda: chain(x)] * 20))
    figures[KERNEL] = samples[len(samples) // 2] / CHAIN
    if device.type == "cuda":
        figures["launch.graph_s"] = _graph(device, chain) / CHAIN
        with contextlib.suppress(Exception):  # no compiler for torch.compile to use: the figure is left out
            figures["launch.compiled_s"] = _compiled(clock, trained) / CHAIN
    return figures


def _graph(device: torch.device, chain: Callable[[torch.Tensor], torch.Tensor]) -> float:
    x = torch.ones(16, device=device)
    side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants a warm-up on a stream of its own
        chain(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(x)
    graph.replay()
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / 20


def _compiled(clock: Clock, x: torch.Tensor) -> float:
    """Matmuls, since what is elementwise would become a single kernel."""
    square = torch.eye(16, device=x.device)

    def matmuls(start: torch.Tensor) -> torch.Tensor:
        for _ in range(CHAIN):
            start = torch.mv(square, start)
        return start

    function = torch.compile(matmuls)
    function(x)
    function(x)
    clock.wait()
    return min(clock.host_seconds([lambda: function(x)]) for _ in range(20))
