"""Sequences split over the context-parallel axis: whether in balanced order, and which dims are such sequences."""

from __future__ import annotations

from autopar.graph.ir import ModelGraph
from autopar.graph.size import SEQ, Size, divide
from autopar.plan import Plan
from autopar.sharding.check import chosen
from autopar.sharding.layout import CONTEXT, SpmdType


def is_balanced(plan: Plan, model: ModelGraph) -> bool:
    """Whether cp holds sequences in balanced order: some causal attention has its queries split by position on cp, all
    such attend to sequences as they are (not several tokens made of one), and there is an even number of equal chunks
    for each rank."""
    cp = plan.mesh.cp
    if cp == 1 or plan.job.seq_len % (2 * cp):
        return False
    sizes = [
        graph.nodes[operand].meta.shape[-2]
        for candidate in plan.candidates.values()
        for graph in (model.kinds[candidate.decision.kind].graph,)
        for node in graph.of("op")
        if node.op == "aten.scaled_dot_product_attention"
        for axis, strategy in chosen(node, graph, candidate.decision).items()
        if axis == CONTEXT and strategy.by_position
        for operand in node.operands()[:2]
    ]
    return bool(sizes) and all(size == SEQ for size in sizes)


def is_sequence(size: int | Size, kind: SpmdType) -> bool:
    """Whether a dim of this (global) size, split as ``kind``, is split by position in the sequence."""
    return divide(size, kind.blocks) == SEQ
