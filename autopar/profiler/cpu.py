"""The ``cpu`` device: this machine, measured once and remembered.

Measurements take a few seconds and are kept in ``$AUTOPAR_CACHE`` (or ``~/.cache/autopar``) under the machine, its
cores and the torch version, so that the same plan is priced the same until `cpu_node(n, refresh=True)` measures again.

Ranks on one machine share its cores. Under torchrun each rank computes on one thread (it sets OMP_NUM_THREADS=1), so r
ranks on c cores each run at the one-thread rate while r <= c and at c/r of it beyond; a single rank uses all cores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from autopar.cluster import Device, Link
from autopar.errors import BadInputError

SCHEMA = 3
RESERVE_BYTES = 512 << 20
"""Model constant: a Python process with torch and gloo loaded, and what its allocator keeps (0.3 to 1 GiB)."""

CROWD = 8
"""Most ranks that gloo is measured with at once."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one rank reaches on some threads: FLOP/s by dtype, attention FLOP/s in float32, bytes/s of copies too large
    for the cache and of copies that stay in it."""

    matmul_flops: dict[str, float]
    attention_flops: float
    memory_bandwidth: float
    cache_bandwidth: float


@dataclass(frozen=True, slots=True)
class GlooRates:
    """gloo over loopback between ``ranks`` ranks at once: seconds per step, bytes/s per rank and direction."""

    ranks: int
    step_s: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class CpuProfile:
    """One measurement of this machine. ``one``/``all``: on one thread, on all cores. ``pair``/``crowd``: gloo between
    two ranks, and between more ranks than cores where those are few. ``date``: UTC, ISO 8601."""

    machine: str
    cores: int
    torch: str
    date: str
    memory_bytes: int
    cache_bytes: int
    one: Rates
    all: Rates
    call_s: float
    pair: GlooRates
    crowd: GlooRates

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> CpuProfile:
        """Inverse of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"profile schema {data.get('schema')!r}, expected {SCHEMA}")
        fields = {name: value for name, value in data.items() if name != "schema"}
        rates = {name: Rates(**data[name]) for name in ("one", "all")}
        gloo = {name: GlooRates(**data[name]) for name in ("pair", "crowd")}
        return CpuProfile(**{**fields, **rates, **gloo})


def cpu_node(devices_per_node: int, refresh: bool = False) -> tuple[Device, Link]:
    """One of ``devices_per_node`` CPU ranks that share this machine, and the link between them (taken for other nodes
    too: name another in a cluster file).

    Raises BadInputError if torch is not installed, or the machine has no memory for so many ranks.
    """
    profile = cpu_profile(refresh)
    crowding = max(1.0, devices_per_node / profile.cores)
    rates = profile.all if devices_per_node == 1 else profile.one
    memory = profile.memory_bytes // devices_per_node
    if memory <= RESERVE_BYTES:
        raise BadInputError(
            f"cpu: {devices_per_node} ranks leave {memory:,} bytes of this machine's {profile.memory_bytes:,} to each, "
            f"and a process takes {RESERVE_BYTES:,} before its first tensor; use fewer devices per node"
        )
    gloo = profile.crowd if crowding > 1 else profile.pair
    waiting = crowding / max(1.0, gloo.ranks / profile.cores)
    how = f"measured {profile.date} with torch {profile.torch} on {profile.machine}, {profile.cores} cores"
    shared = f"{how}; {devices_per_node} ranks share the cores"
    link = Link(
        bandwidth=gloo.bandwidth,
        latency_s=gloo.step_s * waiting,
        shared_by=waiting,
        sources={
            "bandwidth": f"{shared}: gloo all-reduces of 4 MiB between {gloo.ranks} ranks over loopback",
            "latency_s": f"{shared}: gloo all-reduces of 4 bytes between {gloo.ranks} ranks over loopback",
            "efficiency": "model constant: the bandwidth is one that was reached",
            "shared_by": f"model constant: ranks beyond the {gloo.ranks} measured take turns on the cores",
        },
    )
    # Ranks beyond the cores take turns; what all cores together read and write is shared even before that.
    bandwidth = min(rates.memory_bandwidth, profile.all.memory_bandwidth / devices_per_node)
    peak = {dtype: flops / crowding for dtype, flops in rates.matmul_flops.items()}
    device = Device(
        name="cpu",
        title=f"CPU rank, {profile.machine}",
        backend="cpu",
        memory_bytes=memory,
        reserve_bytes=RESERVE_BYTES,
        peak_flops=peak,
        memory_bandwidth=bandwidth,
        cache_bytes=profile.cache_bytes // devices_per_node,
        cache_bandwidth=max(bandwidth, rates.cache_bandwidth / crowding),
        processors=1,
        matmul_efficiency=1.0,
        attention_efficiency=min(1.0, rates.attention_flops / rates.matmul_flops["fp32"]),
        memory_efficiency=1.0,
        launch_s=profile.call_s * crowding,
        collective_s=0.0,
        host_bandwidth=bandwidth,
        host_memory_bandwidth=bandwidth,
        host_memory_bytes=memory,
        origin="measured",
        sources={
            "memory_bytes": f"physical memory of the machine over {devices_per_node} ranks",
            "reserve_bytes": "model constant: a Python process with torch and gloo loaded",
            **{f"peak_flops.{dtype}": f"{shared}: a square matmul of 512" for dtype in peak},
            "memory_bandwidth": f"{shared}: a copy of 64 MiB",
            "cache_bytes": f"last-level cache of the machine over {devices_per_node} ranks",
            "cache_bandwidth": f"{shared}: a copy of 1 MiB",
            "processors": "model constant: matmuls of a CPU are not cut in waves",
            "matmul_efficiency": "model constant: the peak is a rate that was reached",
            "attention_efficiency": f"{how}: causal attention against a matmul",
            "memory_efficiency": "model constant: the bandwidth is one that was reached",
            "launch_s": f"{shared}: a chain of multiplications of 16 numbers",
            "host_bandwidth": f"{shared}: a copy of 64 MiB",
            "host_memory_bandwidth": f"{shared}: a copy of 64 MiB",
            "host_memory_bytes": f"physical memory of the machine over {devices_per_node} ranks",
            "host_speed": "model constant: operators run on the core that starts them, whose time launch_s is",
            "collective_s": "model constant: gloo starts no kernel; its steps are measured",
        },
    )
    return device, link


def cpu_profile(refresh: bool = False) -> CpuProfile:
    """This machine's profile: from the cache, or measured and put there."""
    machine, cores, torch_version = machine_name(), usable_cores(), _torch_version()
    path = cache_folder() / f"cpu-{_digest(machine, cores, torch_version)}.json"
    if not refresh:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            profile = CpuProfile.from_json(json.loads(path.read_text()))
            if (profile.machine, profile.cores, profile.torch) == (machine, cores, torch_version):
                return profile
    profile = measure_cpu(machine, cores, torch_version)
    from autopar.plan import write_whole

    with contextlib.suppress(OSError, BadInputError):  # without a cache, the next run measures again
        write_whole(path, json.dumps(profile.to_json(), indent=1) + "\n")
    return profile


def measure_cpu(machine: str, cores: int, torch_version: str) -> CpuProfile:
    """Measure this machine now; takes about 3 s. Raises BadInputError if gloo cannot reach the loopback network."""
    from autopar.profiler import cpu_ops
    from autopar.profiler.gloo_links import gloo_link

    one = _rates(1)
    every = _rates(cores) if cores > 1 else one
    # On a busy machine several threads may look slower than one; they need not be used then.
    flops = {dtype: max(one.matmul_flops[dtype], every.matmul_flops[dtype]) for dtype in one.matmul_flops}
    every = Rates(flops, *(max(getattr(one, name), getattr(every, name)) for name in Rates.__slots__[1:]))
    with cpu_ops.threads(1):
        call_s = cpu_ops.call_seconds()
        try:
            pair, crowd = (GlooRates(ranks, *gloo_link(ranks)) for ranks in (2, max(2, min(2 * cores, CROWD))))
        except RuntimeError as error:
            raise BadInputError(f"cpu: cannot measure collectives: {error}; is the loopback network up?") from error
    return CpuProfile(
        machine=machine,
        cores=cores,
        torch=torch_version,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        memory_bytes=usable_memory(),
        cache_bytes=cache_bytes(),
        one=one,
        all=every,
        call_s=call_s,
        pair=pair,
        crowd=crowd,
    )


def _rates(threads: int) -> Rates:
    from autopar.profiler import cpu_ops

    with cpu_ops.threads(threads):
        return Rates(
            {name: cpu_ops.matmul_flops(dtype) for name, dtype in cpu_ops.DTYPES.items()},
            cpu_ops.attention_flops(),
            cpu_ops.copy_bandwidth(cpu_ops.MEMORY_COPY),
            cpu_ops.copy_bandwidth(cpu_ops.CACHE_COPY),
        )


def machine_name() -> str:
    """Host name and processor, so that a shared home directory does not mix machines."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return f"{platform.node()} ({processor})"


def usable_cores() -> int:
    """Cores this process may run on."""
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory() -> int:
    """Bytes of physical memory, or of the control group's limit where that is less."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def cache_bytes() -> int:
    """Bytes of the last-level cache as Linux tells; 4 MiB where it does not."""
    for level in (3, 2):
        with contextlib.suppress(OSError, ValueError):
            text = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size").read_text().strip()
            return int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0)
    return 4 << 20


def cache_folder() -> Path:
    """``$AUTOPAR_CACHE``, else ``~/.cache/autopar``."""
    return Path(os.environ.get("AUTOPAR_CACHE") or Path.home() / ".cache" / "autopar")


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError as error:
        raise BadInputError("cpu: the device is measured with torch, which is not installed") from error


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
