"""The cluster: groups of nodes, the devices in them and the links between them.

A `Cluster` is self-contained: it carries every figure a price depends on, so that a saved plan stays priced as it was.
Figures come from `autopar.catalog` (data files, each figure with its source), or for ``cpu`` from a measurement.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from autopar.errors import BadInputError
from autopar.measured import Measured

BACKENDS = ("cuda", "cpu")
DTYPES = ("fp64", "fp32", "bf16", "fp16", "fp8", "fp4")
"""Operands of matmuls for which a device may have a rate."""
LINK_FIGURES = ("bandwidth", "latency_s", "efficiency", "shared_by")
FORM = 'NODESxDEVICES_PER_NODE:DEVICE, such as "8x8:h100" (one node of 4 CPU ranks: "1x4:cpu")'


def _check_positive(owner: str, values: Mapping[str, float], zero: tuple[str, ...] = ()) -> None:
    for name, value in values.items():
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < 0 or (value == 0 and name not in zero):
            bound = "a number of at least 0" if name in zero else "a positive number"
            raise BadInputError(f"{owner}: {name} must be {bound}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Link:
    """One tier of the network, as one device sees it.

    ``bandwidth``: bytes/s per direction of one port. ``shared_by``: devices that share one port (8 devices on 4
    network cards: 2). ``efficiency``: the fraction of ``bandwidth`` that large messages reach. ``latency_s``: seconds
    one step of a collective takes however small its message. ``sources``: where each figure is from, by name.
    """

    bandwidth: float
    latency_s: float
    efficiency: float = 1.0
    shared_by: float = 1.0
    sources: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_positive("link", {name: getattr(self, name) for name in LINK_FIGURES}, zero=("latency_s",))
        if self.efficiency > 1:
            raise BadInputError(f"link: efficiency must be at most 1, not {self.efficiency!r}")

    @property
    def device_bandwidth(self) -> float:
        """Bytes/s per direction that each device reaches when all of them use the link at once."""
        return self.bandwidth * self.efficiency / self.shared_by

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or one CPU rank) with the figures its prices depend on.

    * ``backend``: torch's device type, "cuda" or "cpu"; collectives run on NCCL or gloo accordingly.
    * ``memory_bytes``: what the driver reports in total; ``reserve_bytes``: of these, what no tensor can use.
    * ``peak_flops``: dense FLOP/s by dtype, one of `DTYPES`; a dtype that the device lacks is left out ("fp8" before
      Hopper, "bf16" before Ampere). ``memory_bandwidth``: bytes/s.
    * ``cache_bytes``, ``cache_bandwidth``: an operator's first bytes, so many, move at the cache's bytes/s; 0 and 0
      where a cache is not modelled.
    * ``processors``: units that work on one tile each at a time (SMs); 1 where work is not cut in tiles.
    * ``matmul_efficiency``, ``attention_efficiency``: fraction of the peak reached by large matmuls and by fused
      attention; ``memory_efficiency``: fraction of the bandwidth reached by large streaming operators.
      ``matmul_efficiencies``: by dtype, where it is known to be another (a device at its power limit slows down by what
      a FLOP of that dtype draws).
    * ``launch_s``: seconds each operator costs however small it is.
    * ``collective_s``: seconds each collective costs before its first byte moves.
    * ``host_bandwidth``: bytes/s of a copy between host and device, one way; ``host_memory_bandwidth``: bytes/s of the
      host's memory that fall to this device when all of a node use it. 0 where not known: nothing is offloaded then.
    * ``host_speed``: how fast one core of the host runs Python and starts kernels, of one of the hosts that stacks'
      seconds are stated for (`autopar/stack.py`); 1 where not known.
    * ``host_memory_bytes``: of the host's memory, this device's share; 0 where not known: taken to be enough.
    * ``power_w``: watts the board is built to draw at most (TDP), taken to be what it draws while it computes; 0 where
      not known: energy is not told then. ``wait_w``: what it draws while it waits, in a bubble or for communication,
      its memory full; 0 where not known: it is then taken to draw ``power_w`` all the time.
    * ``workspace_bytes``: what one handle of the matmul library takes from PyTorch's allocator; part of
      ``reserve_bytes``, told apart for predictions of what is allocated. 0 where not known.
    * ``sources``: where each figure is from, by name. ``origin``: "catalog" or "measured".
    * ``measured``: operators of a profile, if one is used (`with_profile`): they price before the figures do.
    """

    name: str
    title: str
    backend: str
    memory_bytes: int
    reserve_bytes: int
    peak_flops: dict[str, float] = field(hash=False)
    memory_bandwidth: float
    cache_bytes: int
    cache_bandwidth: float
    processors: int
    matmul_efficiency: float
    attention_efficiency: float
    memory_efficiency: float
    launch_s: float
    collective_s: float
    matmul_efficiencies: dict[str, float] = field(default_factory=dict, hash=False)
    host_bandwidth: float = 0.0
    host_memory_bandwidth: float = 0.0
    host_memory_bytes: int = 0
    host_speed: float = 1.0
    power_w: float = 0.0
    wait_w: float = 0.0
    workspace_bytes: int = 0
    origin: str = "catalog"
    sources: dict[str, str] = field(default_factory=dict, hash=False)
    measured: Measured | None = None

    def __post_init__(self) -> None:
        owner = f"device {self.name!r}"
        if self.backend not in BACKENDS:
            raise BadInputError(f"{owner}: unknown backend {self.backend!r}; one of {', '.join(BACKENDS)}")
        texts = ("name", "title", "backend", "peak_flops", "matmul_efficiencies", "origin", "sources", "measured")
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in texts}
        unknown = (
            "workspace_bytes",
            "cache_bytes",
            "cache_bandwidth",
            "host_bandwidth",
            "host_memory_bandwidth",
            "host_memory_bytes",
            "wait_w",
        )
        _check_positive(owner, numbers, zero=("launch_s", "collective_s", "reserve_bytes", "power_w", *unknown))
        if not self.peak_flops:
            raise BadInputError(f"{owner}: peak_flops is empty; give the dense FLOP/s of at least one dtype")
        if unknown_dtypes := set(self.peak_flops) - set(DTYPES):
            raise BadInputError(
                f"{owner}: peak_flops has the unknown dtype {min(unknown_dtypes)!r}; known: {', '.join(DTYPES)}"
            )
        _check_positive(owner, {f"peak_flops.{dtype}": value for dtype, value in self.peak_flops.items()})
        _check_positive(owner, {f"matmul_efficiencies.{one}": value for one, value in self.matmul_efficiencies.items()})
        for name in ("matmul_efficiency", "attention_efficiency", "memory_efficiency"):
            if getattr(self, name) > 1:
                raise BadInputError(f"{owner}: {name} must be at most 1, not {getattr(self, name)!r}")
        if self.cache_bytes and self.cache_bandwidth < self.memory_bandwidth:
            raise BadInputError(
                f"{owner}: cache_bandwidth is below memory_bandwidth; set cache_bytes to 0 to ignore it"
            )
        if self.power_w and self.wait_w > self.power_w:
            raise BadInputError(f"{owner}: wait_w {self.wait_w:g} is above power_w {self.power_w:g}; give both")
        if self.reserve_bytes >= self.memory_bytes:
            raise BadInputError(
                f"{owner}: memory_bytes {self.memory_bytes:,} leaves nothing above the {self.reserve_bytes:,} bytes "
                "of reserve_bytes"
            )

    def peak(self, dtype: str) -> float:
        """Dense peak FLOP/s for a job's dtype. Raises BadInputError if the device has no figure for it."""
        if dtype not in self.peak_flops:
            others = "choose one of these, or another device"
            way_out = "fp64 jobs are proofs: run them on cpu" if dtype == "fp64" else others
            raise BadInputError(
                f"device {self.name!r} has no {dtype} matmul rate; it has {', '.join(self.peak_flops)} ({way_out})"
            )
        return self.peak_flops[dtype]

    def sustained(self, dtype: str) -> float:
        """FLOP/s of large matmuls of a dtype. Raises BadInputError like `peak`."""
        return self.peak(dtype) * self.matmul_efficiencies.get(dtype, self.matmul_efficiency)

    @property
    def waiting(self) -> float:
        """What it draws while it waits, as a share of what it draws while it computes; 1 where that is not known."""
        return self.wait_w / self.power_w if self.wait_w and self.power_w else 1.0

    def to_json(self) -> dict[str, Any]:
        """The figures by name; ``measured`` only where there is a profile, rates by dtype only where they are known."""
        left = {"measured"} if self.matmul_efficiencies else {"measured", "matmul_efficiencies"}
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left}
        return data | ({"measured": self.measured.to_json()} if self.measured else {})

    @staticmethod
    def from_json(data: dict[str, Any]) -> Device:
        """Inverse of `to_json`. Raises KeyError or TypeError for missing or unknown fields."""
        plain = {**data, "peak_flops": dict(data["peak_flops"]), "sources": dict(data["sources"])}
        found = data.get("measured")
        return Device(**{**plain, "measured": Measured.from_json(found) if found else None})


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """``nodes`` equal nodes with ``devices_per_node`` devices each, and the links inside and between them."""

    device: Device
    nodes: int
    devices_per_node: int
    intra_node: Link
    inter_node: Link

    def __post_init__(self) -> None:
        for name in ("nodes", "devices_per_node"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInputError(f"cluster: {name} must be a positive integer, not {value!r}; the form is {FORM}")

    def __str__(self) -> str:
        return f"{self.nodes}x{self.devices_per_node}:{self.device.name}"

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return data | {name: data[name].to_json() for name in ("device", "intra_node", "inter_node")}

    @staticmethod
    def from_json(data: dict[str, Any]) -> NodeGroup:
        """Inverse of `to_json`. Raises KeyError or TypeError for missing or unknown fields."""
        links = {name: Link(**data[name]) for name in ("intra_node", "inter_node")}
        return NodeGroup(**{**data, "device": Device.from_json(data["device"]), **links})


@dataclass(frozen=True, slots=True)
class Cluster:
    """Node groups in rank order. Groups must be alike: the search does not mix devices or node sizes yet.

    Raises BadInputError when they differ, naming what does.
    """

    groups: tuple[NodeGroup, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise BadInputError("cluster: no nodes; give at least one node group")
        first = self.groups[0]
        for other in self.groups[1:]:
            if other.device.name != first.device.name:
                raise BadInputError(
                    f"cluster: mixes devices {first.device.name!r} and {other.device.name!r}; plans are made for one "
                    "device: leave all but one out, or plan each part by itself"
                )
            for name in ("devices_per_node", "device", "intra_node", "inter_node"):
                if getattr(other, name) != getattr(first, name):
                    what = "figures of the device" if name == "device" else name
                    raise BadInputError(
                        f"cluster: node groups {first} and {other} differ in {what}; plans are made for equal nodes: "
                        "use the figures of the slowest for all"
                    )

    @property
    def device(self) -> Device:
        return self.groups[0].device

    @property
    def nodes(self) -> int:
        return sum(group.nodes for group in self.groups)

    @property
    def devices_per_node(self) -> int:
        return self.groups[0].devices_per_node

    def joules(self, seconds: float, computing_s: float) -> float | None:
        """What all devices draw in so many seconds, in which each computes for ``computing_s`` on average; None where
        their power is not known."""
        device = self.device
        waits_w = device.wait_w or device.power_w
        drawn = computing_s * device.power_w + (seconds - computing_s) * waits_w
        return self.devices * drawn if device.power_w else None

    @property
    def devices(self) -> int:
        """Number of devices: the world size."""
        return self.nodes * self.devices_per_node

    @property
    def intra_node(self) -> Link:
        return self.groups[0].intra_node

    @property
    def inter_node(self) -> Link:
        return self.groups[0].inter_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.devices_per_node}:{self.device.name}"

    def to_json(self) -> dict[str, Any]:
        """The cluster as plain JSON values, device figures included; `from_json` reads it back equal."""
        return {"groups": [group.to_json() for group in self.groups]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Cluster:
        """Inverse of `to_json`. Raises BadInputError, KeyError or TypeError when fields are wrong or missing."""
        return Cluster(tuple(NodeGroup.from_json(group) for group in data["groups"]))

    @staticmethod
    def parse(text: str) -> Cluster:
        """Read ``"8x8:h100"``: nodes x devices per node : catalog device.

        Raises BadInputError for another form, a count that is not positive, or a device the catalog lacks.
        """
        from autopar.catalog.devices_file import load_group

        groups = []
        for part in str(text).split("+"):
            match = re.fullmatch(r"\s*(-?\d+)\s*[xX]\s*(-?\d+)\s*:\s*(\S+)\s*", part)
            if not match:
                raise BadInputError(
                    f"cannot read cluster {str(text)!r}: write {FORM}, or name a .toml/.yaml/.json file"
                )
            nodes, devices_per_node = int(match[1]), int(match[2])
            if nodes < 1 or devices_per_node < 1:
                raise BadInputError(
                    f"cluster {str(text)!r}: {nodes} nodes of {devices_per_node} devices; both must be at least 1"
                )
            groups.append(load_group(match[3], nodes, devices_per_node))
        return Cluster(_merged(groups))

    @staticmethod
    def load(path: str | Path) -> Cluster:
        """Read a cluster file (.toml, .yaml, .yml or .json); see `autopar.catalog.cluster_file` for its keys.

        Raises BadInputError naming the file and the key that is missing, unknown or wrong.
        """
        from autopar.catalog.cluster_file import read_cluster

        return read_cluster(Path(path))

    def save(self, path: str | Path) -> None:
        """Write a cluster file that `load` reads back equal; the suffix (.toml, .yaml, .json) chooses the format."""
        from autopar.catalog.cluster_file import write_cluster

        write_cluster(self, Path(path))

    def with_profile(self, path: str | Path) -> Cluster:
        """The same cluster priced by a profile that `autopar profile` wrote: its operators, launch overhead, memory and
        host bandwidth, and its links where it has them.

        Raises BadInputError for a file that is no profile, or is of another device than the cluster's.
        """
        from autopar.profiler.attach import attached
        from autopar.profiler.database import Profile

        return attached(self, Profile.load(path), str(path))

    def with_links(self, intra_node: Link | None = None, inter_node: Link | None = None) -> Cluster:
        """The same nodes with other links."""
        intra, inter = intra_node or self.intra_node, inter_node or self.inter_node
        return Cluster(tuple(replace(group, intra_node=intra, inter_node=inter) for group in self.groups))


def _merged(groups: list[NodeGroup]) -> tuple[NodeGroup, ...]:
    """Neighbouring groups of equal nodes as one."""
    merged: list[NodeGroup] = []
    for group in groups:
        last = merged[-1] if merged else None
        if last and replace(last, nodes=1) == replace(group, nodes=1):
            merged[-1] = replace(last, nodes=last.nodes + group.nodes)
        else:
            merged.append(group)
    return tuple(merged)
