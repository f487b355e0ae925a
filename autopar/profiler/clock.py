"""Times what runs on a device: with its own events where it has them, else with the host's clock.

A device that works through a queue (cuda) runs behind the host. Two figures follow, and are kept apart:

* **device seconds**: between two events of the queue, with the queue filled ahead so that the device never waits for
  the host: `Clock.device_samples`;
* **host seconds**: what the host takes to enqueue: `Clock.host_seconds`.

On the CPU there is no queue: both are the time of the call, which is that of the calling thread alone where it does all
of the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

from autopar.profiler.timing import Timing

Call = Callable[[], object]

AHEAD = 1.5
"""How much longer the device is kept busy than the host takes to enqueue what is timed."""

FILLER_BYTES = 256 << 20
"""Bytes that one filler copy moves: a fraction of a millisecond on a device with some TB/s."""


class Clock(Protocol):
    """A way to time calls on one device."""

    def device_samples(self, calls: Sequence[Call]) -> list[float]:
        """Device seconds of each call, run one after the other."""

    def plain_samples(self, calls: Sequence[Call]) -> list[float]:
        """The same at once, without filling the queue: for what must run beside other work."""

    def host_seconds(self, calls: Sequence[Call]) -> float:
        """Host seconds from the first call until the last is enqueued."""

    def wait(self) -> None:
        """Return when the device has done all that was asked of it."""


class HostClock:
    """The CPU: a call has run when it returns. ``now``: seconds so far, such as `time.thread_time`: where all work is
    done by the calling thread, its own time leaves out what other processes take."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def device_samples(self, calls: Sequence[Call]) -> list[float]:
        samples = []
        for call in calls:
            start = self._now()
            call()
            samples.append(self._now() - start)
        return samples

    def plain_samples(self, calls: Sequence[Call]) -> list[float]:
        return self.device_samples(calls)

    def host_seconds(self, calls: Sequence[Call]) -> float:
        start = self._now()
        for call in calls:
            call()
        return self._now() - start

    def wait(self) -> None:
        return None


class EventClock:
    """A device with a queue and timing events.

    ``event``: makes an event with ``record()`` and ``elapsed_time(later)`` in milliseconds; ``synchronize``: waits for
    the queue; ``fill``: enqueues one piece of work that keeps the device busy for a while.
    """

    def __init__(self, event: Callable[[], Any], synchronize: Call, fill: Call) -> None:
        self._event, self._synchronize, self._fill = event, synchronize, fill
        self._filler_s = 0.0

    def device_samples(self, calls: Sequence[Call]) -> list[float]:
        enqueue = self.host_seconds(calls)  # a run to know how far ahead the queue must be
        self.wait()
        for _ in range(self._fillers(enqueue)):
            self._fill()
        return self.plain_samples(calls)

    def plain_samples(self, calls: Sequence[Call]) -> list[float]:
        events = [self._event() for _ in range(len(calls) + 1)]
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        self.wait()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]

    def host_seconds(self, calls: Sequence[Call]) -> float:
        self.wait()
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start

    def wait(self) -> None:
        self._synchronize()

    def _fillers(self, enqueue_s: float) -> int:
        """Fillers that take longer than the host needs to enqueue the calls and an event after each."""
        if not self._filler_s:
            first, last = self._event(), self._event()
            self._fill()
            first.record()
            for _ in range(4):
                self._fill()
            last.record()
            self.wait()
            self._filler_s = max(1e-6, first.elapsed_time(last) / 4e3)
        return min(1000, 1 + int(AHEAD * enqueue_s / self._filler_s))


def clock_of(device: torch.device) -> Clock:
    """The clock of a torch device: "cpu", or an accelerator with events ("cuda")."""
    if device.type == "cpu":
        return HostClock()
    source = torch.empty(FILLER_BYTES // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    module = getattr(torch, device.type)
    return EventClock(
        lambda: module.Event(enable_timing=True),
        lambda: module.synchronize(device),
        lambda: target.copy_(source),
    )


def sampled(
    clock: Clock, run: Callable[[int], object], buffers: int, budget_s: float, least: int = 3, most: int = 100
) -> Timing:
    """Run ``run(i)`` on rotating buffers i < ``buffers``: once to warm up, then between ``least`` and ``most`` times,
    within ``budget_s`` seconds where ``least`` allows."""
    clock.host_seconds([lambda: run(0)])
    clock.wait()
    first = clock.device_samples([lambda: run(1 % buffers)])[0]
    repeats = max(least, min(most, int(budget_s / max(first, 1e-9))))
    calls = [_bound(run, (2 + index) % buffers) for index in range(repeats)]
    return Timing.of(clock.device_samples(calls))


def _bound(run: Callable[[int], object], index: int) -> Call:
    return lambda: run(index)
