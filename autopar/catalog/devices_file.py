"""Device figures from the catalog: one YAML file per device in ``catalog/devices/``, each figure with its source.

A figure is ``{value, source}``; a constant of the cost model also carries the range (``low``, ``high``) it may
plausibly lie in. ``cpu`` has no file: the machine at hand is measured (`autopar.profiler.cpu`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from autopar.cluster import Device, Link, NodeGroup
from autopar.errors import BadInputError

FOLDER = Path(__file__).parent / "devices"
LINKS = ("intra_node", "inter_node")
TEXTS = ("title", "backend")
Value = TypeVar("Value")
INTEGERS = ("memory_bytes", "reserve_bytes", "cache_bytes", "processors", "host_memory_bytes", "workspace_bytes")


def device_names() -> tuple[str, ...]:
    """Every device that can be named in a cluster, in alphabetical order."""
    return tuple(sorted([path.stem for path in FOLDER.glob("*.yaml")] + ["cpu"]))


def load_group(name: str, nodes: int, devices_per_node: int) -> NodeGroup:
    """Nodes of the device called ``name`` with its usual links; "cpu": this machine, shared by ``devices_per_node``
    ranks. Raises BadInputError for an unknown name, listing the known ones.
    """
    if name == "cpu":
        from autopar.profiler.cpu import cpu_node

        device, link = cpu_node(devices_per_node)
        return NodeGroup(device, nodes, devices_per_node, link, link)
    if name not in device_names():
        raise BadInputError(f"unknown device {name!r}; the catalog has {', '.join(device_names())}")
    device, intra_node, inter_node = _from_catalog(name)
    return NodeGroup(device, nodes, devices_per_node, intra_node, inter_node)


@cache
def _from_catalog(name: str) -> tuple[Device, Link, Link]:
    return read_device(name, yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


def figures_of(data: dict[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """The figures of a device file by dotted name: ``{"peak_flops.bf16": {"value": ..., "source": ...}, ...}``."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in data.items():
        if isinstance(entry, dict) and "value" in entry:
            found[prefix + name] = entry
        elif isinstance(entry, dict):
            found.update(figures_of(entry, f"{prefix}{name}."))
    return found


def read_device(name: str, data: dict[str, Any]) -> tuple[Device, Link, Link]:
    """A device and the links inside and between its usual nodes, from the contents of its file.

    Raises BadInputError naming a figure without source or out of range.
    """
    figures = figures_of(data)
    values: dict[str, float] = {}
    for key, figure in figures.items():
        place = f"device file {name!r}, {key}"
        value = figure["value"]
        if unknown := set(figure) - {"value", "source", "low", "high"}:
            raise BadInputError(f"{place}: unknown entry {sorted(unknown)[0]!r}; known: value, source, low, high")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise BadInputError(f"{place}: {value!r} is not a number (YAML wants the sign in 1.5e+12)")
        if not str(figure.get("source") or "").strip():
            raise BadInputError(f"{place}: no source; every figure says where it is from")
        if not figure.get("low", value) <= value <= figure.get("high", value):
            raise BadInputError(f"{place}: {value} is outside its plausible range {figure['low']} to {figure['high']}")
        values[key] = float(value)
    sources = {key: figure["source"] for key, figure in figures.items()}
    fields: dict[str, Any] = {text: data[text] for text in TEXTS}
    for part in ("peak_flops", "matmul_efficiencies"):
        fields[part] = _part(values, part)
    for key, value in values.items():
        if "." not in key:
            fields[key] = int(value) if key in INTEGERS else value
    own = {key: source for key, source in sources.items() if key.partition(".")[0] not in LINKS}
    intra, inter = (Link(**_part(values, link), sources=_part(sources, link)) for link in LINKS)
    return Device(name=name, sources=own, **fields), intra, inter


def _part(values: dict[str, Value], prefix: str) -> dict[str, Value]:
    """The entries under ``prefix.``, by the rest of their name."""
    return {key.split(".", 1)[1]: value for key, value in values.items() if key.startswith(prefix + ".")}
