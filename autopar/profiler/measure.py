"""`autopar profile ops`: measures the operators of one device for some minutes, into a profile that can be continued.

Every point is kept as it is measured; the file is written with the launch figures, after the first point, then at most
once a second, and at the end. A run that finds its output file continues it until the minutes are spent in all: so a
killed run is finished by the same command, and a profile of 5 minutes becomes one of 30.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from autopar.errors import BadInputError
from autopar.profiler.clock import Clock, HostClock, clock_of, sampled
from autopar.profiler.database import OpRecord, Profile, begun, check_target
from autopar.profiler.grid import Limits, Table
from autopar.profiler.launch import KERNEL, launch_figures
from autopar.profiler.machine import describe, device_of, free_bytes
from autopar.profiler.operators import BUILD, DTYPES, supported
from autopar.profiler.shapes import FAMILIES, Point
from autopar.profiler.timing import Timing

if TYPE_CHECKING:
    from collections.abc import Iterator

SAVE_EVERY_S = 1.0
SHARE = 1200
"""Parts of the whole time, one of which a direction of a point may take."""

SETS = 64
"""Most sets of buffers to rotate through."""

ON_CPU = ("fp32", "bf16")
"""What is measured on a CPU unless asked for others, which few compute in."""

FILL = {"cpu": 1e9, "cuda": 1e11}
"""Bytes/s at which buffers are filled, at least: what a share of the time may hold."""

Told = Callable[[float, float, str], None]
"""Told after each point: seconds spent, seconds in all, what was measured."""


@dataclass(frozen=True, slots=True)
class OpsRun:
    """What to measure. ``ops``, ``dtypes``: names, all if empty. ``threads``: of the CPU; ranks that share a machine
    compute on one."""

    out: Path
    device: str = "cpu"
    minutes: float = 5.0
    ops: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for what, given, known in (
            ("--ops", self.ops, [each.name for each in FAMILIES]),
            ("--dtypes", self.dtypes, [*DTYPES, "bytes"]),
        ):
            if unknown := [name for name in given if name not in known]:
                raise BadInputError(f"{what}: unknown {unknown[0]!r}; known: {', '.join(known)}")
        if not 0 < self.minutes < float("inf"):
            raise BadInputError(f"--minutes must be positive, not {self.minutes!r}")
        if self.threads < 1:
            raise BadInputError(f"--threads must be at least 1, not {self.threads!r}")


def measure_ops(run: OpsRun, told: Told = lambda spent, total, what: None) -> Profile:
    """Measure, and write the profile to ``run.out``, which is continued if it is there.

    Raises BadInputError if the file is of another device or no profile, or the device is not there. A Ctrl-C keeps what
    was measured.
    """
    check_target(run.out)
    device = device_of(run.device)
    threads = run.threads if device.type == "cpu" else 0
    profile = begun(run.out, describe(device))
    total, spent = 60 * run.minutes, profile.spent_s.get("ops", 0.0)
    if spent >= total:
        told(spent, total, f"nothing to do: {run.out} holds {spent / 60:.1f} minutes already; raise --minutes for more")
        return profile
    with _threads(threads):
        session = _Session(run, device, threads, profile, spent, told)
        try:
            session.measure(total)
        finally:
            session.save()
    return session.profile


class _Session:
    """One run: its tables, and what it has measured beyond the profile it continues."""

    def __init__(
        self, run: OpsRun, device: torch.device, threads: int, profile: Profile, spent: float, told: Told
    ) -> None:
        self.run, self.device, self.threads, self.told = run, device, threads, told
        self.profile, self.spent_before = profile, spent
        self.clock: Clock = HostClock(time.thread_time) if threads == 1 else clock_of(device)
        self.rng = np.random.default_rng(run.seed + len(profile.ops))
        self.begin = time.perf_counter()
        self.saved = -SAVE_EVERY_S
        self.fresh: list[OpRecord] = []
        self.figures: dict[str, float] = {}
        self.cache_bytes = int(profile.device.get("cache_bytes", 0))

    @property
    def spent(self) -> float:
        return self.spent_before + time.perf_counter() - self.begin

    def measure(self, total: float) -> None:
        if KERNEL not in self.profile.figures:
            self.figures = launch_figures(self.device, self.clock)
            self.save()
        tables = self._tables()
        if not tables:
            raise BadInputError("nothing to measure: the device runs none of the operators asked for in these dtypes")
        share = min(0.5, max(0.01, total / SHARE))
        room = min(free_bytes(self.device), int(FILL[self.device.type] * share))
        limits = Limits(share / 3, room, self.device.type)
        queue: dict[int, tuple[float, Point] | None] = {i: t.next(self.rng, limits) for i, t in enumerate(tables)}
        # Every table gets its first point, the smallest, however short the time is.
        while self.spent < total or not all(table.samples or table.refused for table in tables):
            open_ = {index: found for index, found in queue.items() if found is not None}
            if not open_:
                self.told(total, total, "every point that fits is measured")
                break
            index = max(open_, key=lambda index: open_[index][0])
            table, (_, point) = tables[index], open_[index]
            self._point(table, point, share)
            queue[index] = table.next(self.rng, limits)
            self.told(self.spent, total, f"{table.family.name} {table.dtype} {'x'.join(map(str, point))}")
            if time.perf_counter() - self.saved > SAVE_EVERY_S:
                self.save()

    def _tables(self) -> list[Table]:
        """What the device runs of what is asked for, with what the profile knows already."""
        tables = []
        dtypes = {*(self.run.dtypes or (ON_CPU if self.device.type == "cpu" else DTYPES)), "bytes"}
        for each in FAMILIES:
            for dtype in each.dtypes:
                wanted = dtype in dtypes and (not self.run.ops or each.name in self.run.ops)
                if wanted and not supported(each, dtype, self.device):
                    tables.append(Table(each, dtype))
        by_name = {(table.family.name, table.dtype): table for table in tables}
        for record in self.profile.ops:
            known = by_name.get((record.op, record.dtype))
            if known and record.threads == self.threads:
                sample = Timing(record.seconds, record.least, record.spread, record.repeats)
                known.add(record.at, {record.direction: sample})
        return tables

    def _point(self, table: Table, point: Point, share: float) -> None:
        """Measure all directions of a point. One that does not fit in memory is not tried again."""
        each = table.family
        resident = max(1.0, each.resident(point, table.width))
        room = max(2, int(free_bytes(self.device) / resident))
        sets = min(SETS, room, max(2, -int(-3 * self.cache_bytes // resident)))
        found: dict[str, Timing] = {}
        try:
            calls = BUILD[each.name](point, DTYPES.get(table.dtype, torch.uint8), self.device, sets)
            for direction, call in calls.items():
                if direction in each.directions:
                    found[direction] = sampled(self.clock, call, sets, share)
        except RuntimeError:  # torch.OutOfMemoryError is one
            table.refused.add(point)
        finally:
            calls = {}
            gc.collect(0)
            if self.device.type == "cuda" and point in table.refused:
                torch.cuda.empty_cache()
        if found:
            table.add(point, found)
        for direction, sample in found.items():
            self.fresh.append(
                OpRecord(
                    each.name,
                    table.dtype,
                    direction,
                    self.threads,
                    point,
                    sample.seconds,
                    sample.least,
                    sample.spread,
                    sample.repeats,
                )
            )

    def save(self) -> None:
        """Write what is known now."""
        self.profile = self.profile.with_records(self.fresh, figures=self.figures, spent_s={"ops": self.spent})
        self.fresh = []
        self.profile.save(self.run.out)
        self.saved = time.perf_counter() if self.profile.ops else -SAVE_EVERY_S


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run torch's operators on ``count`` threads for a while (0: leave them)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def names(text: str) -> tuple[str, ...]:
    """ "a,b" as names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
