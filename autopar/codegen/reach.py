"""From which positions of its token ids a model predicts: what tells a language model's objective from its graph."""

from __future__ import annotations

from dataclasses import replace

import torch

from autopar.graph.interpret import run_graph, torch_dtype
from autopar.graph.ir import ModelGraph, Node, OpGraph, Ref, map_refs
from autopar.graph.size import SEQ

MATMULS = ("aten.matmul", "aten.bmm", "aten.mm")
_BATCH, _SEQ = 1, 4
_MASKED = -1e4  # a bias of this or less allows nothing

Reach = dict[str, bool]
"""Batch tensors that a value depends on: True if on positions after its own, False if on its own and earlier ones."""


def whole_graph(graph: ModelGraph) -> OpGraph:
    """The constants and all blocks of a model as one graph; its inputs are the batch tensors, by their keys."""
    nodes = {key: Node(key, "input", meta, target=key) for key, meta in graph.batch.items()}
    outputs: list[tuple[str, ...]] = []

    def add(prefix: str, part: OpGraph, given: dict[str, str], targets: dict[str, str]) -> tuple[str, ...]:
        names = given | {name: f"{prefix} {name}" for name in part.nodes if name not in given}
        for node in part.nodes.values():
            if node.name not in given:
                args, kwargs = (map_refs(value, names.__getitem__) for value in (node.args, node.kwargs))
                target = targets.get(node.target, node.target)
                nodes[names[node.name]] = replace(node, name=names[node.name], args=args, kwargs=kwargs, target=target)
        return tuple(names[name] for name in part.outputs)

    sizes = {node.name: node.target for node in graph.constants.of("input")}
    constants = dict(
        zip(graph.constants.outputs, add("constant", graph.constants, sizes, {}), strict=True),
    )
    for place, block in enumerate(graph.blocks):
        given = {}
        for name, source in block.inputs.items():
            if source.origin == "block":
                given[name] = outputs[source.block][source.index]
            else:
                given[name] = source.key if source.origin == "batch" else constants[source.key]
        outputs.append(add(f"{place}", graph.kinds[block.kind].graph, given, block.parameters))
    return OpGraph(nodes, outputs[-1])


def reach_of_predictions(graph: ModelGraph) -> Reach:
    """What the logits of the cross-entropies depend on; empty if there is none.

    Positions are mixed by attention (scaled_dot_product_attention, or a product with a matrix over positions), whose
    masks are evaluated at a small size; every other operator counts as one that looks back at most.
    """
    whole = whole_graph(graph)
    reaches: dict[str, Reach] = {}
    found: Reach = {}
    for node in whole.nodes.values():
        if node.kind != "op":
            reaches[node.name] = {node.target: False} if node.kind == "input" else {}
            continue
        operands = node.operands()
        if node.op == "autopar.cross_entropy":
            _join(found, reaches[operands[0]])
        mixed = _mixed(whole, graph, node)
        reach: Reach = {}
        for operand in operands:
            _join(reach, dict.fromkeys(reaches[operand], True) if operand in mixed else reaches[operand])
        reaches[node.name] = reach
    return found


def _join(reach: Reach, other: Reach) -> None:
    for key, later in other.items():
        reach[key] = reach.get(key, False) or later


def _mixed(whole: OpGraph, graph: ModelGraph, node: Node) -> tuple[str, ...]:
    """The operands of which every position sees all positions."""
    operands = node.operands()
    if node.op == "aten.scaled_dot_product_attention":
        mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
        causal = node.kwargs.get("is_causal", node.args[5] if len(node.args) > 5 else False)
        causal = causal or (isinstance(mask, Ref) and _looks_back(whole, graph, mask.name, _MASKED))
        return () if causal else operands[1:3]
    if node.op in MATMULS and whole.nodes[operands[0]].meta.shape[-1] == SEQ:
        return () if _looks_back(whole, graph, operands[0], 0.0) else operands[1:2]
    return ()


def _looks_back(whole: OpGraph, graph: ModelGraph, name: str, nothing: float) -> bool:
    """Whether a mask, or weights over positions [..., s, s], have nothing above the diagonal: entries of at
    most ``nothing``. Yes if none can tell.

    What depends on parameters or on products of activations (biases, scores) is taken to be zero, batch tensors (a
    mask of padding) to be one.
    """
    cone, values = _cone(whole, graph, name)
    try:
        (mask,) = run_graph(cone, values, torch.float32, (_BATCH, _SEQ))
    except (KeyError, IndexError, RuntimeError):
        return True
    if name in values:
        return True
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    allowed = mask if mask.dtype == torch.bool else mask > nothing
    return not bool(allowed.triu(1).any())


def _cone(whole: OpGraph, graph: ModelGraph, name: str) -> tuple[OpGraph, dict[str, torch.Tensor]]:
    """The part of the graph that makes ``name``, up to what is given as values."""
    values: dict[str, torch.Tensor] = {}
    nodes: dict[str, Node] = {}
    pending = [name]
    while pending:
        node = whole.nodes[pending.pop()]
        if node.name in nodes:
            continue
        reads = [whole.nodes[operand] for operand in node.operands()]
        if node.kind == "op" and node.op not in MATMULS and all(read.kind != "parameter" for read in reads):
            nodes[node.name] = node
            pending += node.operands()
            continue
        nodes[node.name] = replace(node, kind="input", args=(), kwargs={})
        shape, dtype = node.meta.at(_BATCH, _SEQ), torch_dtype(node.meta.dtype, torch.float32)
        if node.kind == "input":
            values[node.name] = torch.ones(shape, dtype=dtype)
        elif node.kind == "op":
            values[node.name] = torch.zeros(shape, dtype=dtype)
        elif node.target in graph.buffer_values:
            values[node.name] = torch.tensor(graph.buffer_values[node.target], dtype=dtype).reshape(shape)
    ordered = {key: nodes[key] for key in whole.nodes if key in nodes}
    return OpGraph(ordered, (name,)), values
