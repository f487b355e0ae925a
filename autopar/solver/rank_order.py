"""In which orders ranks may go through the mesh axes, and what pipeline stages and data ranks then see of the cluster.

Nodes hold neighbouring ranks, so the order says which axes lie inside a node. Searched are two: the default one, in
which data ranks come after the model axes and pipeline stages lie apart, and the one in which neighbouring stages come
first (`STAGES_NEAR`). The model axes, cp and tp, are innermost in both: what they send stands in the way of every
operator, what data ranks send runs beside computation. Any other order is run where it is fixed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod

from autopar.mesh import AXES, Mesh, Span
from autopar.schedule import SCHEDULES
from autopar.solver.collective_costs import near_of, placement_of

Order = tuple[str, ...]

STAGES_NEAR: Order = ("dp", "pp", "cp", "tp")
"""Ranks of a pipeline that have the same samples are neighbours, data ranks lie apart."""


@lru_cache(maxsize=4096)
def orders_of(pp: int, dp: int, model: int, per_node: int) -> tuple[Order, ...]:
    """The orders searched, the default one first, for ``model`` ranks of cp and tp, on nodes of ``per_node`` devices:
    both, unless the same stages share nodes and data ranks lie alike in both."""
    if pp == 1 or dp == 1:
        return (AXES,)
    stages = [near_of(pp, stride, per_node) for stride in (dp * model, model)]
    data = [placement_of(dp, stride, per_node) for stride in (model, pp * model)]
    return (AXES,) if stages[0] == stages[1] and data[0] == data[1] else (AXES, STAGES_NEAR)


def model_order(order: Order) -> Order:
    """The order that stands for all that place the model axes alike."""
    return AXES if order == STAGES_NEAR else order


def inside(mesh: Mesh, per_node: int) -> int:
    """How many neighbouring data ranks a node holds."""
    if mesh.order == AXES:
        return max(1, per_node // mesh.tp)
    return prod(min(size, max(1, per_node // stride)) for size, stride in mesh.data_span())


@lru_cache(maxsize=4096)
def lying(mesh: Mesh, orders: tuple[Order, ...]) -> tuple[tuple[Span, ...], tuple[int, ...]]:
    """Under these orders the different spans of the data ranks, and how far apart neighbouring stages are."""
    ranked = [replace(mesh, order=order) for order in orders]
    return tuple(dict.fromkeys(one.data_span() for one in ranked)), tuple(one.strides()["pp"] for one in ranked)


@lru_cache(maxsize=4096)
def transfers(schedule: str, pp: int, stages: int, links: tuple[float, ...]) -> tuple[float, ...]:
    """Seconds in which each stage hands on to the next: nothing on one rank, else as ``links`` says of its ranks, each
    with the next and the last with the first (`CollectiveCosts.handed_on`)."""
    found, rank_of = [], SCHEDULES[schedule].rank_of
    for stage in range(stages - 1):
        here, there = sorted((rank_of(stage, pp), rank_of(stage + 1, pp)))
        found.append(0.0 if here == there else links[here] if there == here + 1 else links[-1])
    return tuple(found)
