"""The error bar of a prediction: an 80 % interval from the residuals of published runs.

`benchmarks/published.py` predicts published training runs and notes, by group of runs, the 10th and 90th percentile of
measured over predicted seconds (``catalog/residuals.yaml``). A prediction for a stack with such runs takes those of its
groups; any other, of what autopar emits too, takes all groups', each with the same weight, or less if it has fewer than
ten runs: of how a new stack does, groups that were fitted say less than how they differ.

A device that was measured, or is priced by a profile, has no published runs. There the constants of `RATES` are moved
by `SPREAD`, an assumption: how much a rate measured alone may differ under load. The plan is priced with one at a time
at either end; the changes in the step time, taken as independent, add in quadrature to each side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import hypot
from pathlib import Path
from typing import Any

import yaml

from autopar.cluster import Cluster
from autopar.graph.ir import ModelGraph
from autopar.plan import Plan
from autopar.solver.reprice import price_plan
from autopar.stack import stack_of

RESIDUALS = Path(__file__).parents[1] / "catalog" / "residuals.yaml"
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
    """(low, high) seconds between which the measured step time lies with a probability of about 80 %."""
    step_time, device = plan.predicted.step_time, plan.cluster.device
    if device.origin == "catalog" and device.measured is None:
        low, high = residuals(plan.job.stack)
        return step_time * min(1.0, low), step_time * max(1.0, high)
    faster: list[float] = []
    slower: list[float] = []
    for below, above in ranges(plan.cluster):
        changes = [price_plan(plan, model, cluster).step_time - step_time for cluster in (below, above)]
        faster.append(max(0.0, -min(changes)))
        slower.append(max(0.0, *changes))
    return max(step_time * 0.05, step_time - hypot(*faster)), step_time + hypot(*slower)


def residuals(stack: str) -> tuple[float, float]:
    """The 10th and 90th percentile of measured over predicted seconds for a stack and its variants."""
    known = _residuals()
    found = known["stacks"].get(stack_of(stack).family, known["all"])
    return float(found["low"]), float(found["high"])


@cache
def _residuals() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(RESIDUALS.read_text())
    return found


def ranges(cluster: Cluster) -> Iterator[tuple[Cluster, Cluster]]:
    """For each uncertain constant, the cluster with it at the low and at the high end."""
    for name in RATES:
        value = _get(cluster, name)
        low, high = value * (1 - SPREAD), value * (1 + SPREAD)
        if name.endswith("efficiency"):
            low, high = min(low, 1.0), min(high, 1.0)
        if low != high:
            yield _set(cluster, name, low), _set(cluster, name, high)
    measured = cluster.device.measured
    if measured:
        fast, slow = (replace(measured, slowdown=measured.slowdown * (1 + part)) for part in (-SPREAD, SPREAD))
        yield _with_device(cluster, measured=fast), _with_device(cluster, measured=slow)


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
