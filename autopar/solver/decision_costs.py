"""What a block decision costs on one rank: seconds of its operators and conversions, elements and bytes it takes in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from autopar.graph.dispatch import expert_parameters, shared_experts
from autopar.graph.ir import BlockKind, Node
from autopar.job import Job
from autopar.sharding.check import chosen
from autopar.sharding.conversions import path
from autopar.sharding.decision import BlockDecision
from autopar.sharding.layout import Layout
from autopar.sharding.local import local_shape
from autopar.solver.prices import FREE, AxisPrices, Price, element_bytes
from autopar.solver.recompute import operator_key, step_key


def priced_pieces(kind: BlockKind, decision: BlockDecision, prices: AxisPrices) -> Iterator[tuple[str, Price, str]]:
    """(key as in `solver.recompute`, price, source of the figure) of a decision's operators and conversion steps."""
    graph = kind.graph
    for node in graph.of("op"):
        yield operator_key(node), *prices.operator(node, graph, chosen(node, graph, decision))
    for conversion in decision.conversions:
        meta = graph.nodes[conversion.tensor].meta
        layout = conversion.source
        for place, (axis, step) in enumerate(path(layout, conversion.target, meta.requires_grad)):
            key = step_key(conversion.tensor, conversion.source, conversion.target, place)
            yield key, prices.conversion(meta, layout, axis, step), prices.collectives.origin
            layout = layout.with_type(axis, step.target)


def decision_price(kind: BlockKind, decision: BlockDecision, prices: AxisPrices) -> tuple[Price, dict[str, float]]:
    """Seconds of a decision, and of these how many are measured or from the catalog."""
    total = FREE
    sources: dict[str, float] = {}
    for _, price, source in priced_pieces(kind, decision, prices):
        sources[source] = sources.get(source, 0.0) + price.seconds
        total += price
    return total, sources


def local_bytes(node: Node, layout: Layout, axes: Mapping[str, int], batch: int, job: Job) -> int:
    """Bytes one rank holds of a node's value."""
    count = 1
    for size in local_shape(node.meta.at(batch, job.seq_len), layout, axes):
        count *= size
    return count * element_bytes(node.meta.dtype, job)


def local_elements(kind: BlockKind, decision: BlockDecision, frozen: bool = False) -> int:
    """Parameter elements one rank holds on the model axes; ``frozen``: of these, those that do not train."""
    total = 0
    for node in kind.graph.of("parameter"):
        if frozen and node.meta.requires_grad:
            continue
        count = 1
        for size in local_shape(node.meta.at(1, 1), decision.inputs[node.name], decision.axes):
            count *= size
        total += count
    return total


def tail_elements(kind: BlockKind, decision: BlockDecision) -> int:
    """Of `local_elements`, those of the last parameter that trains."""
    trains = [node for node in kind.graph.of("parameter") if node.meta.requires_grad]
    count = 1 if trains else 0
    for node in trains[-1:]:
        for size in local_shape(node.meta.at(1, 1), decision.inputs[node.name], decision.axes):
            count *= size
    return count


def expert_elements(kind: BlockKind, decision: BlockDecision) -> int:
    """Of `local_elements`, those of experts that data ranks share."""
    if shared_experts(kind.graph) == 1:
        return 0
    held = expert_parameters(kind.graph)
    return sum(prod(local_shape(n.meta.at(1, 1), decision.inputs[n.name], decision.axes)) for n in held)


def boundary_bytes(kind: BlockKind, decision: BlockDecision, batch: int, job: Job) -> int:
    """Bytes per rank of the inputs that other blocks hand in."""
    return sum(boundary_parts(kind, decision, batch, job))


def boundary_parts(kind: BlockKind, decision: BlockDecision, batch: int, job: Job) -> list[int]:
    """`boundary_bytes`, input by input."""
    nodes = [node for node in kind.graph.of("input") if node.meta.requires_grad]
    return [local_bytes(node, decision.inputs[node.name], decision.axes, batch, job) for node in nodes]
