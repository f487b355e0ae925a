"""Cluster files: what users write, in TOML, YAML or JSON.

    device = "h100"              # a catalog device, or a table with every figure (as `Cluster.save` writes)
    nodes = 8
    devices_per_node = 8
    memory_bytes = 80e9          # optional; so are reserve_bytes, power_w, wait_w (watts) and host_speed
    profile = "h200.json"        # optional: what `autopar profile` wrote, beside this file
    [inter_node]                 # optional; so is [intra_node]
    bandwidth = 25e9             # bytes/s per port and direction
    latency_s = 5e-6
    shared_by = 2                # devices per port
    efficiency = 0.9

Several groups of equal nodes are written as ``[[groups]]``, each with these keys. An unknown key is an error.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from autopar.catalog.devices_file import LINKS, load_group
from autopar.cluster import Cluster, Device, Link, NodeGroup
from autopar.errors import BadInputError


def _spelled(value: object) -> object:
    """A whole number that YAML 1.1 took for text, such as ``80e9``."""
    try:
        return int(number) if isinstance(value, str) and (number := float(value)).is_integer() else value
    except ValueError:
        return value


Bytes = Annotated[int, BeforeValidator(_spelled)]


READERS: Mapping[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
    ".json": json.loads,
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class LinkFile(_Model):
    """What may be said of a link; the rest stays as in the catalog."""

    bandwidth: float | None = None
    latency_s: float | None = None
    efficiency: float | None = None
    shared_by: float | None = None
    sources: dict[str, str] | None = None


class MeasuredFile(_Model):
    """The operators of a profile, as `Cluster.save` writes them."""

    digest: str
    title: str
    tables: dict[str, str]
    host_s: float
    slowdown: float


class DeviceFile(_Model):
    """Every figure of a device."""

    name: str
    title: str
    backend: str
    memory_bytes: int
    reserve_bytes: int
    peak_flops: dict[str, float]
    memory_bandwidth: float
    cache_bytes: int
    cache_bandwidth: float
    processors: int
    matmul_efficiency: float
    attention_efficiency: float
    memory_efficiency: float
    launch_s: float
    collective_s: float
    matmul_efficiencies: dict[str, float] = {}
    host_bandwidth: float = 0.0
    host_memory_bandwidth: float = 0.0
    host_memory_bytes: int = 0
    host_speed: float = 1.0
    power_w: float = 0.0
    wait_w: float = 0.0
    workspace_bytes: int = 0
    origin: str
    sources: dict[str, str]
    measured: MeasuredFile | None = None


class GroupFile(_Model):
    """A group of equal nodes."""

    device: str | DeviceFile
    nodes: PositiveInt
    devices_per_node: PositiveInt
    memory_bytes: Bytes | None = None
    reserve_bytes: Bytes | None = None
    power_w: PositiveFloat | None = None
    wait_w: PositiveFloat | None = None
    host_speed: PositiveFloat | None = None
    profile: str | None = None
    intra_node: LinkFile | None = None
    inter_node: LinkFile | None = None


class ClusterFile(_Model):
    """A whole file in the form with groups."""

    groups: list[GroupFile]


def read_cluster(path: Path) -> Cluster:
    """The cluster described by a file. Raises BadInputError naming the file and the offending key."""
    data = _parsed(path)
    model = ClusterFile if "groups" in data else GroupFile
    try:
        file = model.model_validate(data)
    except ValidationError as error:
        raise BadInputError(f"cluster file {path}: {_first_problem(error)}") from error
    groups = file.groups if isinstance(file, ClusterFile) else [file]
    try:
        return Cluster(tuple(_profiled(_group(group, path), group, path) for group in groups))
    except BadInputError as error:
        raise BadInputError(f"cluster file {path}: {error}") from error


def write_cluster(cluster: Cluster, path: Path) -> None:
    """Write every figure of the cluster; the suffix chooses the format."""
    from autopar.plan import write_whole

    data = cluster.to_json()
    if path.suffix == ".json":
        text = json.dumps(data, indent=1) + "\n"
    elif path.suffix in (".yaml", ".yml"):
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    elif path.suffix == ".toml":
        text = "\n".join(_toml(data)) + "\n"
    else:
        raise BadInputError(f"cluster file {path}: unknown format {path.suffix!r}; end it in .toml, .yaml or .json")
    try:
        write_whole(path, text)
    except OSError as error:
        raise BadInputError(f"cannot write cluster file {path}: {error.strerror or error}") from error


def _parsed(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise BadInputError(f"cannot read cluster file {path}: {reason or error}") from error
    read = READERS.get(path.suffix)
    if read is None:
        raise BadInputError(f"cluster file {path}: unknown format {path.suffix!r}; end it in .toml, .yaml or .json")
    try:
        data = read(text)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BadInputError(f"cluster file {path} is not valid {path.suffix[1:].upper()}: {reason}") from error
    if not isinstance(data, dict):
        raise BadInputError(f"cluster file {path}: expected keys device, nodes, devices_per_node, found {data!r:.60}")
    return data


def _first_problem(error: ValidationError) -> str:
    """The first thing pydantic found, naming the key and, for an unknown one, those that are known."""
    # A device is a name or a table; pydantic tells what is wrong with it as either. Text that is no table was a name.
    problems = [problem for problem in error.errors() if "str" not in problem["loc"]] or error.errors()
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    places = [str(part) for part in first["loc"] if part not in ("str", "DeviceFile")]
    key = ".".join(places)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; known there: {', '.join(_known(places[:-1]))}"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    return f"key {key!r}: {first['msg'][:1].lower()}{first['msg'][1:]}, not {first['input']!r:.60}"


def _known(places: list[str]) -> list[str]:
    """The keys a place in a file may have."""
    models: Mapping[str, type[BaseModel]] = {"device": DeviceFile, "intra_node": LinkFile, "inter_node": LinkFile}
    named = [place for place in places if not place.isdigit()]
    if named and named[-1] in models:
        return list(models[named[-1]].model_fields)
    return list(GroupFile.model_fields) + ["groups"] * (not named)


def _group(group: GroupFile, path: Path) -> NodeGroup:
    told = f"cluster file {path.name}"
    figures = {name: getattr(group, name).model_dump(exclude_none=True) for name in LINKS if getattr(group, name)}
    if isinstance(group.device, str):
        nodes = load_group(group.device, group.nodes, group.devices_per_node)
        intra, inter = (_changed(getattr(nodes, name), figures.get(name, {}), told) for name in LINKS)
        nodes = replace(nodes, intra_node=intra, inter_node=inter)
    else:
        device = Device.from_json(group.device.model_dump())
        for name in LINKS:
            for figure in ("bandwidth", "latency_s"):
                if figure not in figures.get(name, {}):
                    raise BadInputError(f"key '{name}.{figure}' is missing; a device of your own has no usual links")
        intra, inter = (Link(**figures[name]) for name in LINKS)
        nodes = NodeGroup(device, group.nodes, group.devices_per_node, intra, inter)
    own = ("memory_bytes", "reserve_bytes", "power_w", "wait_w", "host_speed")
    given = {name: getattr(group, name) for name in own}
    changed = {name: value for name, value in given.items() if value is not None}
    if changed:
        sources = {**nodes.device.sources, **dict.fromkeys(changed, told)}
        nodes = replace(nodes, device=replace(nodes.device, **changed, sources=sources))
    return nodes


def _profiled(nodes: NodeGroup, group: GroupFile, path: Path) -> NodeGroup:
    """The group priced by the profile it names, whose path is relative to the file's."""
    return Cluster((nodes,)).with_profile(path.parent / group.profile).groups[0] if group.profile else nodes


def _changed(link: Link, figures: dict[str, Any], told: str) -> Link:
    sources = {**link.sources, **dict.fromkeys(figures, told), **figures.get("sources", {})}
    return replace(link, **{**figures, "sources": sources}) if figures else link


def _toml(data: Mapping[str, Any], prefix: str = "") -> list[str]:
    """TOML lines of nested tables of numbers and strings: plain values first, then tables, then arrays of tables."""
    lines = [
        f"{_toml_key(key)} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in data.items()
        if not isinstance(value, dict | list)
    ]
    for key, value in data.items():
        path = prefix + _toml_key(key)
        if isinstance(value, dict):
            lines += ["", f"[{path}]", *_toml(value, path + ".")]
        elif isinstance(value, list):
            for item in value:
                lines += ["", f"[[{path}]]", *_toml(item, path + ".")]
    return lines


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)
