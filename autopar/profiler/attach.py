"""Puts a profile into a cluster: its operators as tables, its launch overhead, bandwidths and links as figures.

Figures that a profile has take the place of the catalog's and name the profile as their source; all others stay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autopar.cluster import Cluster, Device, Link
from autopar.errors import BadInputError
from autopar.measured import Measured
from autopar.profiler.database import OpRecord, Profile
from autopar.profiler.links import LinkFit, fit_links
from autopar.profiler.shapes import FAMILIES, WIDTHS

UNPRICED = ("adamw_foreach", "grouped_matmul", "copy_to_device", "copy_to_host")
"""Measured, but not read operator by operator: not what emitted code runs, or a figure of the device instead."""

MEMORY_SLACK = 0.15
"""How far the memory a driver reports may be from the catalog's for a device to be of the same kind."""

BEYOND_CACHE = 4
"""A copy of so many times the cache's bytes, or more, tells the bandwidth of the memory behind it."""

LARGE = 16 << 20
"""Bytes from which a copy to or from the host tells a bandwidth."""

LEAST_POINTS = 3
"""Fewer points than this say nothing of other shapes: the table is left out."""

NCCL_START_S = 3.6e-6
"""What the cost model adds to `Device.collective_s` for NCCL's quickest protocol (`solver.collective_costs.NCCL`)."""


def attached(cluster: Cluster, profile: Profile, name: str = "the profile") -> Cluster:
    """The cluster priced by ``profile``. Raises BadInputError if that is of another device."""
    device, ranks = cluster.device, cluster.devices_per_node
    _check(device, profile, name)
    crowding = max(1.0, ranks / int(profile.device["processors"])) if device.backend == "cpu" else 1.0
    threads = 0
    if device.backend == "cpu":
        threads = 1 if ranks > 1 else int(profile.device["processors"])
    tables = _tables(profile, threads)
    if profile.ops and not tables:
        counts = sorted({record.threads for record in profile.ops})
        if threads in counts:
            raise BadInputError(f"{name}: it holds too few shapes of any operator to price by; measure for longer")
        raise BadInputError(
            f"{name}: measured on {', '.join(map(str, counts))} threads, but a rank of {cluster} computes on "
            f"{threads}: measure again with --threads {threads}"
        )
    host_s = profile.figures.get("launch.eager_s", 0.0) if device.backend == "cuda" else 0.0
    measured = Measured(profile.digest, profile.title, tables, host_s, crowding)
    changes = _figures(device, profile, crowding)
    told = f"profile {profile.digest} ({profile.title})"
    sources = {**device.sources, **{key: f"{told}: {why}" for key, (_, why) in changes.items()}}
    values: dict[str, Any] = {key: value for key, (value, _) in changes.items()}
    device = replace(device, **values, sources=sources, measured=measured)
    links: dict[str, Any] = _links(cluster, profile, told)
    return Cluster(tuple(replace(group, device=device, **links) for group in cluster.groups))


def _check(device: Device, profile: Profile, name: str) -> None:
    found = profile.device
    wrong = ""
    if found["backend"] != device.backend:
        wrong = f"it was measured on {found['backend']}, the device is of {device.backend}"
    elif device.backend == "cpu" and device.name == "cpu" and str(found["name"]) not in device.title:
        wrong = f"the cluster's cpu is {device.title.removeprefix('CPU rank, ')}"
    elif device.backend == "cuda" and found["processors"] != device.processors:
        wrong = f"it has {found['processors']} processors, {device.name} has {device.processors}"
    elif device.backend == "cuda" and abs(found["memory_bytes"] / device.memory_bytes - 1) > MEMORY_SLACK:
        wrong = f"it has {found['memory_bytes']:,} bytes of memory, {device.name} has {device.memory_bytes:,}"
    if wrong:
        raise BadInputError(
            f"{name} is of {found['name']}, not of the cluster's device {device.name!r} ({wrong}): name the cluster by "
            "the device that was measured, or leave the profile out"
        )


def _tables(profile: Profile, threads: int) -> dict[str, str]:
    """Every operator, dtype and direction; none of an operator that lacks a direction."""
    found: dict[str, list[OpRecord]] = {}
    for record in profile.ops:
        if record.threads == threads:
            found.setdefault(f"{record.op} {record.dtype} {record.direction}", []).append(record)
    tables = {}
    for family in FAMILIES:
        for dtype in family.dtypes if family.name not in UNPRICED else ():
            names = [f"{family.name} {dtype} {direction}" for direction in family.directions]
            least = LEAST_POINTS if family.name != "adamw_fused" else 2
            if all(len(found.get(name, ())) >= least for name in names):
                tables.update({name: "\n".join(map(_line, found[name])) for name in names})
    return tables


def _line(record: OpRecord) -> str:
    """Of a CPU the least of the repeats counts, as in `autopar.profiler.cpu`: what else runs there only adds time."""
    seconds = record.least if record.threads else record.seconds
    return f"{' '.join(map(str, record.at))} {seconds:.4g} {record.spread:.2g}"


def _figures(device: Device, profile: Profile, crowding: float) -> dict[str, tuple[float, str]]:
    """Figures of the device that the profile has: value, and what was measured."""
    found: dict[str, tuple[float, str]] = {}
    if "launch.kernel_s" in profile.figures:
        found["launch_s"] = profile.figures["launch.kernel_s"] * crowding, "a chain of multiplications of 16 numbers"
    if device.backend == "cpu":
        return found  # bandwidths of a cpu device are measured already, with what ranks share
    copies = [record for record in profile.ops if record.op == "copy"]
    most = max(copies, key=lambda record: record.at[0] * WIDTHS[record.dtype], default=None)
    if most and most.at[0] * WIDTHS[most.dtype] >= BEYOND_CACHE * int(profile.device.get("cache_bytes", 0)):
        rate = 2 * most.at[0] * WIDTHS[most.dtype] / most.seconds
        found["memory_bandwidth"] = max(device.memory_bandwidth, rate), "datasheet, or what a copy reached above it"
        found["memory_efficiency"] = min(1.0, rate / device.memory_bandwidth), f"a copy of {most.at[0]:,} elements"
    names = ("copy_to_device", "copy_to_host")
    both = [[record for record in profile.ops if record.op == name and record.at[0] >= LARGE] for name in names]
    if all(both):
        rates = [max(record.at[0] / record.seconds for record in records) for records in both]
        found["host_bandwidth"] = min(rates), "pinned copies, the slower direction"
    fits = _tiers(profile, "nccl")
    if fits:
        start = max(0.0, min(fit.start_s for fit in fits.values()) - NCCL_START_S)
        found["collective_s"] = start, "what small collectives take beyond their steps"
    return found


def _tiers(profile: Profile, transport: str) -> dict[str, LinkFit]:
    fits = fit_links(profile.collectives)
    return {fit.tier: fit for fit in fits if fit.kind == "all" and fit.transport == transport}


def _links(cluster: Cluster, profile: Profile, told: str) -> dict[str, Any]:
    """Links of the tiers that were measured, with as many ranks a node as the cluster has: what ranks share is in the
    figures."""
    transport = "gloo" if cluster.device.backend == "cpu" else "nccl"
    of_node = [r for r in profile.collectives if r.node_ranks == cluster.devices_per_node]
    links = {}
    for tier, fit in _tiers(replace(profile, collectives=tuple(of_node)), transport).items():
        why = f"{told}: fitted to {fit.points} {transport} collectives, residual {100 * fit.residual:.0f} %"
        sources = {"bandwidth": why, "latency_s": why}
        sources |= dict.fromkeys(("efficiency", "shared_by"), "model constant: the bandwidth is what a rank reached")
        links[tier] = Link(fit.bandwidth, fit.latency_s, sources=sources)
    return links
