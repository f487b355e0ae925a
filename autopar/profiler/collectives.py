"""`autopar profile collectives`, under torchrun: measures collectives along the axes of a mesh, one by one and jointly.

Every group of an axis runs at the same time, as in training, and the slowest rank counts. Rank 0 keeps the time and the
file; what it decides (go on, how often) it tells the others, so that no rank waits for one that has stopped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autopar.errors import BadInputError
from autopar.profiler.clock import Clock, clock_of
from autopar.profiler.database import CollectiveRecord, Profile, begun, check_target, now
from autopar.profiler.links import KINDS
from autopar.profiler.machine import describe, device_of, free_bytes
from autopar.profiler.measure import SAVE_EVERY_S, Told
from autopar.profiler.overlap import overlap_figures
from autopar.profiler.ranks import largest
from autopar.profiler.timing import Timing

LARGEST = 1 << 30
"""Bytes of the largest message."""
SIZES = tuple(1 << power for power in range(10, 31, 2))
"""1 KB to 1 GB, by four."""
BUFFERS = 4.0
"""Bytes of buffers against those of the message in full: input, output, and what the library takes."""
LEAST, MOST = 3, 50


@dataclass(frozen=True, slots=True)
class LinksRun:
    """What to measure. ``mesh``: axis sizes, outermost first; empty: nodes x ranks of a node, the latter halved again
    where it is even."""

    out: Path
    device: str = "cpu"
    minutes: float = 2.0
    mesh: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()
    largest: int = LARGEST

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise BadInputError(f"--kinds: unknown {unknown[0]!r}; known: {', '.join(KINDS)}")
        if not 0 < self.minutes < float("inf"):
            raise BadInputError(f"--minutes must be positive, not {self.minutes!r}")
        if self.largest < SIZES[0]:
            raise BadInputError(f"--largest must be at least {SIZES[0]} bytes, not {self.largest!r}")


@dataclass(frozen=True, slots=True)
class Axis:
    """Ranks ``stride`` apart, ``size`` to a group; ``group`` is this rank's."""

    size: int
    stride: int
    nodes: int
    per_node: int
    group: Any


def measure_collectives(run: LinksRun, told: Told = lambda spent, total, what: None) -> Profile | None:
    """Measure, and write the profile to ``run.out`` (rank 0), continuing it if it is there. Returns it on rank 0.

    Raises BadInputError, on every rank, without torchrun's environment, for a mesh of another number of ranks, or for
    a file that is of another device or no profile.
    """
    rank, world, local, node_ranks = _environment()
    mesh = run.mesh or _usual_mesh(world, node_ranks)
    if prod(mesh) != world:
        raise BadInputError(f"--mesh {'x'.join(map(str, mesh))} has {prod(mesh)} ranks, torchrun started {world}")
    device = device_of("cpu" if run.device == "cpu" else f"cuda:{local}")
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    try:
        return _Session(run, mesh, rank, world, node_ranks, device, told).measure()
    finally:
        dist.destroy_process_group()


class _Session:
    def __init__(
        self,
        run: LinksRun,
        mesh: tuple[int, ...],
        rank: int,
        world: int,
        node_ranks: int,
        device: torch.device,
        told: Told,
    ) -> None:
        self.run, self.mesh, self.rank, self.device, self.told = run, mesh, rank, device, told
        self.world, self.node_ranks = world, node_ranks
        self.clock: Clock = clock_of(device)
        self.transport = "gloo" if device.type == "cpu" else "nccl"
        self.begin = time.perf_counter()
        self.saved = -SAVE_EVERY_S
        self.fresh: list[CollectiveRecord] = []
        self.figures: dict[str, float] = {}
        self.profile = Profile(describe(device), now())
        self.spent_before = 0.0

    def measure(self) -> Profile | None:
        known = self._continued()
        axes = [self._axis(size, stride) for size, stride in axes_of(self.mesh)]
        total = 60 * self.run.minutes
        free = free_bytes(self.device) / (self.node_ranks if self.device.type == "cpu" else 1)
        room = int(-largest([-free], self.device)[0])
        last: dict[tuple[str, int, int], float] = {}
        cells = [
            (nbytes, axis, kind)
            for nbytes in SIZES
            if nbytes <= self.run.largest and BUFFERS * nbytes <= room
            for axis in axes
            for kind in self.run.kinds or KINDS
        ]
        try:
            for nbytes, axis, kind in cells:
                where = (kind, axis.size, axis.stride)
                record = CollectiveRecord(
                    kind,
                    self.transport,
                    "x".join(map(str, self.mesh)),
                    axis.size,
                    axis.stride,
                    axis.nodes,
                    axis.per_node,
                    self.node_ranks,
                    nbytes,
                    *(0.0,) * 3,
                    0,
                )
                if record.key in known:
                    last[where] = known[record.key]
                    continue
                left = total - self.spent
                # Four times the bytes take four times as long at most; a message that the time left cannot hold is
                # passed over, and so are the larger ones after it. The smallest is always measured.
                expected = (LEAST + 2) * 4 * last.get(where, 0.0)
                if not self._agreed(nbytes == SIZES[0] or 0 <= expected < left):
                    continue
                share = max(0.02, min(1.0, total / (4 * len(cells))))
                sample = self._sample(_call(kind, nbytes, axis, self.device, self.rank), share)
                last[where] = sample.seconds
                self.fresh.append(
                    replace(
                        record,
                        seconds=sample.seconds,
                        least=sample.least,
                        spread=sample.spread,
                        repeats=sample.repeats,
                    )
                )
                self.told(self.spent, total, f"{kind} over {axis.size} ranks {axis.stride} apart, {nbytes:,} bytes")
                if time.perf_counter() - self.saved > SAVE_EVERY_S:
                    self._save()
            world = dist.group.WORLD
            if world and self._agreed("overlap.compute" not in self.profile.figures and self.world > 1):
                self.figures = overlap_figures(self.device, self.clock, world)
        finally:
            self._save()
        return self.profile if self.rank == 0 else None

    @property
    def spent(self) -> float:
        return self.spent_before + time.perf_counter() - self.begin

    def _continued(self) -> dict[tuple[object, ...], float]:
        """Seconds of what the file holds already, by key, told to all ranks; so is what is wrong with the file."""
        found: list[Any] = [{}, ""]
        if self.rank == 0:
            try:
                check_target(self.run.out)
                self.profile = begun(self.run.out, self.profile.device)
                self.spent_before = self.profile.spent_s.get("collectives", 0.0)
                found[0] = {record.key: record.seconds for record in self.profile.collectives}
            except BadInputError as error:
                found[1] = str(error)
        dist.broadcast_object_list(found, src=0, device=self.device)
        if found[1]:
            raise BadInputError(found[1])
        known: dict[tuple[object, ...], float] = found[0]
        return known

    def _axis(self, size: int, stride: int) -> Axis:
        """The groups of an axis; every rank makes all of them, in the same order."""
        mine: Any = None
        worst = (1, size)
        for ranks in groups_of(size, stride, self.world):
            group = dist.new_group(ranks)
            where = [rank // self.node_ranks for rank in ranks]
            worst = max(worst, (len(set(where)), min(map(where.count, set(where)))))
            if self.rank in ranks:
                mine = group
        return Axis(size, stride, *worst, mine)

    def _agreed(self, wish: bool) -> bool:
        """What rank 0 wishes."""
        told = torch.tensor([int(wish)], device=self.device)
        dist.broadcast(told, src=0)
        return bool(told)

    def _sample(self, call: Callable[[], object], share: float) -> Timing:
        """All ranks run it as often, which they agree on by the slowest; each run's seconds are the slowest rank's."""
        self.clock.host_seconds([call])
        self.clock.wait()
        dist.barrier()
        once = largest(self.clock.device_samples([call]), self.device)[0]
        repeats = max(LEAST, min(MOST, int(share / max(once, 1e-9))))
        dist.barrier()
        return Timing.of(largest(self.clock.device_samples([call] * repeats), self.device))

    def _save(self) -> None:
        if self.rank == 0:
            self.profile = self.profile.with_records(
                collectives=self.fresh, figures=self.figures, spent_s={"collectives": self.spent}
            )
            self.profile.save(self.run.out)
        self.fresh = []
        self.saved = time.perf_counter()


def axes_of(mesh: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(size, stride) of every axis of more than one rank, and of neighbouring axes taken together."""
    strides = [prod(mesh[place + 1 :]) for place in range(len(mesh))]
    seen = set()
    for first in range(len(mesh)):
        for last, size in enumerate(accumulate(mesh[first:], mul), first):
            axis = (size, strides[last])
            if size > 1 and axis not in seen:
                seen.add(axis)
                yield axis


def groups_of(size: int, stride: int, world: int) -> Iterator[list[int]]:
    """The ranks of each group of an axis."""
    for block in range(0, world, size * stride):
        for offset in range(stride):
            yield list(range(block + offset, block + offset + size * stride, stride))


def _call(kind: str, nbytes: int, axis: Axis, device: torch.device, rank: int) -> Callable[[], object]:
    """A collective of float32 whose tensor in full is about ``nbytes``: whole elements for every rank."""
    n, group = axis.size, axis.group
    part = max(1, nbytes // 4 // n)
    whole = torch.zeros(part * n, device=device)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if kind == "all_gather":
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        shard = torch.zeros(part, device=device)
        return lambda: gather(whole, shard, group=group)
    if kind == "reduce_scatter":
        scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        shard = torch.zeros(part, device=device)
        return lambda: scatter(shard, whole, group=group)
    if kind == "all_to_all":
        # In full over the axis: each rank holds an n-th, of which it sends an n-th to every other.
        held = torch.zeros(max(1, part // n) * n, device=device)
        taken = torch.zeros_like(held)
        return lambda: dist.all_to_all_single(taken, held, group=group)
    place = dist.get_group_rank(group, rank)
    other = place + 1 if place % 2 == 0 else place - 1
    if other >= n:
        return lambda: None  # an odd rank out
    peer = dist.get_global_rank(group, other)
    if place % 2 == 0:
        return lambda: dist.send(whole, peer, group=group)
    return lambda: dist.recv(whole, peer, group=group)


def parse_mesh(text: str) -> tuple[int, ...]:
    """ "2x4" as axis sizes, "" as none. Raises BadInputError for anything else."""
    try:
        mesh = tuple(int(part) for part in text.split("x")) if text else ()
    except ValueError:
        mesh = (0,)
    if any(size < 1 for size in mesh):
        raise BadInputError(f"--mesh {text}: write axis sizes, outermost first, such as 2x8")
    return mesh


def _environment() -> tuple[int, int, int, int]:
    """(rank, world size, rank in the node, ranks of a node) as torchrun sets them."""
    try:
        values = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    except (KeyError, ValueError) as error:
        raise BadInputError(
            "collectives are measured between processes: start it with torchrun --nproc-per-node N -m autopar.profiler "
            "collectives -o links.json"
        ) from error
    rank, world, local, node_ranks = values
    return rank, world, local, node_ranks


def _usual_mesh(world: int, node_ranks: int) -> tuple[int, ...]:
    inside = (node_ranks // 2, 2) if node_ranks % 2 == 0 and node_ranks > 2 else (node_ranks,)
    return (world // node_ranks, *inside) if world > node_ranks else inside
