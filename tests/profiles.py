"""Profiles that were never measured: seconds by a formula, for tests of what is done with them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from autopar.cluster import Cluster
from autopar.measured import Measured
from autopar.profiler.database import CollectiveRecord, OpRecord, Profile
from autopar.profiler.shapes import FAMILIES, WIDTHS, Family, Point

DATE = "2026-11-28T12:00:00+00:00"
H100 = {"backend": "cuda", "name": "NVIDIA H100", "memory_bytes": 85_000_000_000, "processors": 132}
DEVICE = {**H100, "driver": "1.0", "torch": "2.11.0", "host": "here", "cache_bytes": 50 << 20}

Seconds = Callable[[Family, Point, str, int], float]


def formula(rate: float = 5e14, bandwidth: float = 2e12, start: float = 2e-6) -> Seconds:
    """Seconds of an operator with one rate, one bandwidth and one overhead."""

    def seconds(each: Family, point: Point, direction: str, width: int) -> float:
        flops, nbytes = each.cost(point, direction, width)
        return start + flops / rate + nbytes / bandwidth

    return seconds


def op_records(
    seconds: Seconds, points: Callable[[Family], Iterable[Point]], dtypes: Iterable[str] = ("bf16", "fp32"), **more: Any
) -> list[OpRecord]:
    """Records of every family in some dtypes at some points."""
    fields = {"threads": 0, "spread": 0.01, "repeats": 9, **more}
    found = []
    for each in FAMILIES:
        for dtype in each.dtypes:
            if dtype not in (*dtypes, "bytes"):
                continue
            for point in dict.fromkeys(points(each)):
                for direction in each.directions:
                    taken = seconds(each, point, direction, WIDTHS.get(dtype, 1))
                    found.append(OpRecord(each.name, dtype, direction, at=point, seconds=taken, least=taken, **fields))
    return found


def spread_points(count: int, low: int = 4, high: int = 2048, seed: int = 0) -> Callable[[Family], list[Point]]:
    """Random sizes between two."""
    draw = random.Random(seed)

    def points(each: Family) -> list[Point]:
        found: list[Point] = []
        while len(found) < count:
            point = tuple(int(low * (high / low) ** draw.random()) for _ in each.dims)
            if each.name.endswith("attention"):
                point = (point[0] * (1 if point[1] % 2 else 2), 1 if point[1] % 2 else 2, *point[2:])
            found.append(point)
        return found

    return points


def profile_of(ops: Iterable[OpRecord] = (), **more: Any) -> Profile:
    return Profile(**{"device": dict(DEVICE), "date": DATE, "ops": tuple(ops), **more})


def collective(kind: str, nbytes: int, seconds: float, size: int = 4, **more: Any) -> CollectiveRecord:
    fields = {"transport": "nccl", "mesh": str(size), "stride": 1, "nodes": 1, "per_node": size, "node_ranks": 8}
    timing = {"least": seconds, "spread": 0.02, "repeats": 9}
    return CollectiveRecord(
        **{"kind": kind, "size": size, "nbytes": nbytes, "seconds": seconds, **fields, **timing, **more}
    )


def erratic(seed: int, count: int = 6, high: int = 256) -> Measured:
    """A device whose times jump about by factors from one shape to the next."""
    draw = random.Random(seed)
    plain = formula(10 ** draw.uniform(8, 11), 10 ** draw.uniform(8, 11), draw.choice((0.0, 1e-6)) + 1e-9)

    def seconds(each: Family, point: Point, direction: str, width: int) -> float:
        return plain(each, point, direction, width) * draw.lognormvariate(0.0, 1.0)

    records = op_records(seconds, spread_points(count, 2, high, seed))
    tables: dict[str, list[str]] = {}
    for record in records:
        line = f"{' '.join(map(str, record.at))} {record.seconds:.4g} {record.spread}"
        tables.setdefault(f"{record.op} {record.dtype} {record.direction}", []).append(line)
    host_s, slowdown = draw.choice((0.0, 1e-5)), draw.choice((1.0, 1.7))
    return Measured(f"erratic {seed}", "erratic", {k: "\n".join(v) for k, v in tables.items()}, host_s, slowdown)


def with_measured(cluster: Cluster, measured: Measured) -> Cluster:
    device = replace(cluster.device, measured=measured)
    return Cluster(tuple(replace(group, device=device) for group in cluster.groups))
