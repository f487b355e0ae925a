"""How long a forward or backward takes whose blocks wait for gathers and are followed by reductions, in one channel.

Maxima of sums of what is given: convex, and no less where anything takes longer.
"""

from __future__ import annotations

from collections.abc import Sequence


def ready_forward(compute: Sequence[float], gathers: Sequence[float]) -> float:
    """When a forward can have ended at the earliest whose block i waits for gather i, all issued at time 0."""
    now = channel = 0.0
    for seconds, gather in zip(compute, gathers, strict=True):
        channel += gather
        now = max(now, channel) + seconds
    return now


def hidden_forward(compute: Sequence[float], gathers: Sequence[float]) -> float:
    """Seconds of a forward whose block i waits for gather i, issued when block i-1 starts."""
    channel = now = started = 0.0
    for seconds, gather in zip(compute, gathers, strict=True):
        channel = max(channel, started) + gather
        started = max(now, channel)
        now = started + seconds
    return now


def hidden_backward(
    compute: Sequence[float],
    gathers: Sequence[float],
    reduces: Sequence[float],
    after: float = 0.0,
    reduce_after: float = 0.0,
) -> float:
    """Seconds of a backward, last block first: the gather of the next block is issued when a block starts, its
    reduction when it has ended; both in one channel. ``after``: seconds once all have ended, then a last reduction."""
    now = 0.0
    channel = ready = gathers[-1] if gathers else 0.0
    for index in range(len(compute) - 1, -1, -1):
        started = max(now, ready)
        if index:
            channel = max(channel, started) + gathers[index - 1]
            ready = channel
        now = started + compute[index]
        if reduces[index]:
            channel = max(channel, now) + reduces[index]
    now += after
    if reduce_after:
        channel = max(channel, now) + reduce_after
    return max(now, channel)
