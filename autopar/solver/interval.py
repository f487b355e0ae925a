"""The error bar of a prediction, until residuals of validation runs take its place.

Every constant of the cost model that is not a fact has a range it may plausibly lie in (``low``, ``high`` in the
device's catalog file). The plan is priced with one constant at a time at either end of its range; the changes in the
step time, taken as independent, add in quadrature to each side. A device without such ranges (measured, or the user's
own) takes ``SPREAD`` for the constants below, an assumption: how much a rate measured alone may differ under load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import hypot
from pathlib import Path
from typing import Any

from autopar.cluster import Cluster, Device
from autopar.graph.ir import ModelGraph
from autopar.plan import Plan
from autopar.solver.reprice import price_plan

SPREAD = 0.25
"""Fraction either way."""
RATES = (
    "matmul_efficiency",
    "attention_efficiency",
    "memory_efficiency",
    "launch_s",
    "collective_s",
    "intra_node.efficiency",
    "intra_node.latency_s",
    "inter_node.efficiency",
    "inter_node.latency_s",
)


def interval_of(plan: Plan, model: ModelGraph) -> tuple[float, float]:
    """(shortest, longest) plausible step time in seconds."""
    faster: list[float] = []
    slower: list[float] = []
    for low, high in ranges(plan.cluster):
        changes = [price_plan(plan, model, cluster).step_time - plan.predicted.step_time for cluster in (low, high)]
        faster.append(max(0.0, -min(changes)))
        slower.append(max(0.0, *changes))
    step_time = plan.predicted.step_time
    return max(step_time * 0.05, step_time - hypot(*faster)), step_time + hypot(*slower)


def ranges(cluster: Cluster) -> Iterator[tuple[Cluster, Cluster]]:
    """For each uncertain constant, the cluster with it at the low and at the high end."""
    known = _catalog_ranges(cluster.device)
    for name in RATES:
        value = _get(cluster, name)
        low, high = known.get(name, (value, value)) if known else (value * (1 - SPREAD), value * (1 + SPREAD))
        if name.endswith("efficiency"):
            low, high = min(low, 1.0), min(high, 1.0)
        if low != high:
            yield _set(cluster, name, low), _set(cluster, name, high)
    measured = cluster.device.measured
    if measured:  # rates measured alone differ under load
        fast, slow = (replace(measured, slowdown=measured.slowdown * (1 + part)) for part in (-SPREAD, SPREAD))
        yield _with_device(cluster, measured=fast), _with_device(cluster, measured=slow)


def _catalog_ranges(device: Device) -> dict[str, tuple[float, float]]:
    if device.origin != "catalog":
        return {}
    import yaml

    from autopar.catalog.devices_file import FOLDER, figures_of

    path = Path(FOLDER) / f"{device.name}.yaml"
    if not path.exists():
        return {}
    figures = figures_of(yaml.safe_load(path.read_text()))
    return {name: (f["low"], f["high"]) for name, f in figures.items() if "low" in f and "high" in f and name in RATES}


def _get(cluster: Cluster, name: str) -> float:
    owner, _, part = name.rpartition(".")
    return float(getattr(getattr(cluster, owner) if owner else cluster.device, part))


def _set(cluster: Cluster, name: str, value: float) -> Cluster:
    owner, _, part = name.rpartition(".")
    if owner:
        return cluster.with_links(**{owner: replace(getattr(cluster, owner), **{part: value})})
    return _with_device(cluster, **{part: value})


def _with_device(cluster: Cluster, **change: Any) -> Cluster:
    device = replace(cluster.device, **change)
    return Cluster(tuple(replace(group, device=device) for group in cluster.groups))
