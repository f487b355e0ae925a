"""The longest sequence that a model's tables of positions allow, read off its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from autopar.graph.blocks import Blocks
from autopar.graph.interpret import run_graph
from autopar.graph.ir import Node, OpGraph
from autopar.graph.size import Size, size_at

_SHORT = (4, 5)
"""Sequences at which positions are looked at: two tell how the largest grows."""
_MOST = 1 << 24
"""Elements of a constant that is looked at at the limit which these two suggest."""


def longest_sequence(blocks: Blocks, buffers: Mapping[str, torch.Tensor]) -> int | None:
    """Positions at most, or None without a limit: rows of embeddings looked up by constants (``arange(s)``), and
    sizes of tensors that are cut to a size that grows with the sequence. ``buffers``: known values by full name."""
    limits = [_cut(blocks.constants, node) for node in blocks.constants.of("op") if node.op == "aten.slice"]
    for block in blocks.blocks:
        graph = blocks.kinds[block.kind].graph
        for node in graph.of("op"):
            if node.op == "aten.embedding":
                ids = graph.nodes[node.operands()[1]]
                source = block.inputs.get(ids.name)
                if source is not None and source.origin == "constant":
                    rows = graph.nodes[node.operands()[0]].meta.shape[0]
                    limits.append(_looked_up(blocks.constants, source.key, buffers, rows))
            elif node.op == "aten.slice":
                limits.append(_cut(graph, node))
    return min((limit for limit in limits if limit is not None), default=None)


def _cut(graph: OpGraph, node: Node) -> int | None:
    dim, end = node.args[1], node.args[3]
    whole = graph.nodes[node.operands()[0]].meta.shape[dim]
    if not isinstance(end, Size) or isinstance(whole, Size):
        return None
    return _limit([size_at(end, 1, seq) - 1 for seq in _SHORT], whole)


def _looked_up(constants: OpGraph, name: str, buffers: Mapping[str, torch.Tensor], rows: int | Size) -> int | None:
    """The longest sequence whose constant ``name`` stays below ``rows``; None if it always does (it is clamped)."""
    limit = _limit(_largest(constants, name, buffers, _SHORT), rows)
    if limit is None:
        return None
    elements = 1
    for size in constants.nodes[name].meta.at(1, limit + 1):
        elements *= size
    if elements > _MOST:
        return limit
    try:
        beyond = _largest(constants, name, buffers, (limit + 1,))
    except RuntimeError:  # a table that is cut to the sequence's length is no longer
        return limit
    return limit if beyond is None or beyond[0] >= size_at(rows, 1, 1) else None


def _largest(
    constants: OpGraph, name: str, buffers: Mapping[str, torch.Tensor], lengths: Sequence[int]
) -> list[int] | None:
    """The largest value of an integer constant at sequences of ``lengths``; None if it needs unknown buffers."""
    needed, pending = set(), [name]
    while pending:
        here = pending.pop()
        if here not in needed:
            needed.add(here)
            pending += constants.nodes[here].operands()
    graph = OpGraph({key: node for key, node in constants.nodes.items() if key in needed}, (name,))
    if any(node.kind != "op" and node.target not in buffers for node in graph.nodes.values()):
        return None
    values = {node.name: buffers[node.target] for node in graph.of("buffer")}
    return [int(run_graph(graph, values, torch.float32, (1, seq))[0].max()) for seq in lengths]


def _limit(largest: list[int] | None, rows: int | Size) -> int | None:
    """The longest sequence whose largest index, linear in its length, is still below ``rows``."""
    if largest is None or isinstance(rows, Size) or largest[1] <= largest[0]:
        return None
    slope = largest[1] - largest[0]
    return (rows - 1 - largest[0]) // slope + _SHORT[0]
