"""A block's sharding in words: what each operator with parameters does on each model axis, and what moves.

Axis names are derived from the choices, never given: an axis on which weights are split is tensor parallel, one on
which the values between blocks are split by sequence is sequence parallel, and so on (`axis_words`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from autopar.graph.ir import BlockKind, ModelGraph, Node, OpGraph
from autopar.graph.size import SEQ
from autopar.sharding.conversions import COMMUNICATES, path
from autopar.sharding.decision import BlockDecision
from autopar.sharding.layout import SpmdType
from autopar.sharding.rules import Strategy, strategy_of

ATTENTION = "aten.scaled_dot_product_attention"
LOSS = "autopar.cross_entropy"


def describe(model: ModelGraph, decisions: dict[str, BlockDecision]) -> dict[str, tuple[str, ...]]:
    """For each candidate its lines, and for each model axis its derived names."""
    told = {name: block_lines(model.kinds[choice.kind], choice) for name, choice in decisions.items()}
    axes = dict.fromkeys(axis for choice in decisions.values() for axis in split_axes(choice))
    return {**told, **{axis: axis_words(model, decisions.values(), axis) for axis in axes}}


def split_axes(decision: BlockDecision) -> tuple[str, ...]:
    """The model axes of more than one rank."""
    return tuple(axis for axis, size in decision.axes.items() if size > 1)


def axis_words(model: ModelGraph, decisions: Iterable[BlockDecision], axis: str) -> tuple[str, ...]:
    """What ``axis`` does in a plan that uses ``decisions``, as people call it."""
    found: set[str] = set()
    for decision in decisions:
        if axis in decision.axes:
            found |= _words_of_kind(model.kinds[decision.kind].graph, decision, axis)
    order = ("tensor parallel", "sequence parallel", "context parallel", "vocabulary parallel")
    return tuple(word for word in order if word in found)


def _words_of_kind(graph: OpGraph, decision: BlockDecision, axis: str) -> set[str]:
    handed = (node for node in graph.of("input") if node.meta.requires_grad)
    split = any(_splits_sequence(node, decision.inputs[node.name][axis]) for node in handed)
    words = {_word_of_op(node, graph, decision, axis) for node in graph.of("op") if node.operands()}
    return (words | {"sequence parallel"} if split else words) - {""}


def _word_of_op(node: Node, graph: OpGraph, decision: BlockDecision, axis: str) -> str:
    types = list(zip(node.operands(), _strategy(node, graph, decision, axis).inputs, strict=True))
    first, kind = graph.nodes[types[0][0]], types[0][1]
    weights = [kind for name, kind in types if graph.nodes[name].kind == "parameter"]
    if node.op == LOSS:
        return "vocabulary parallel" if kind.kind == "S" and kind.dim == _last_dim(first) else ""
    if node.op == ATTENTION:
        return "context parallel" if _splits_sequence(first, kind) else ""
    if not any(weight.kind == "S" for weight in weights):
        return ""
    return "vocabulary parallel" if node.op == "aten.embedding" and weights[0].dim == 0 else "tensor parallel"


def block_lines(kind: BlockKind, decision: BlockDecision) -> tuple[str, ...]:
    """One line per operator that has parameters (and attention, loss), then the collectives of one pass."""
    axes = split_axes(decision)
    if not axes:
        return ()
    rows = [row for node in kind.graph.of("op") for axis in axes if (row := _row(node, kind.graph, decision, axis))]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)) for row in rows]
    return (*(line.rstrip() for line in lines), *_collective_lines(kind.graph, decision))


def _row(node: Node, graph: OpGraph, decision: BlockDecision, axis: str) -> tuple[str, str, str, str] | None:
    parameters = [name for name in node.operands() if graph.nodes[name].kind == "parameter"]
    if not parameters and node.op not in (ATTENTION, LOSS):
        return None
    types = _strategy(node, graph, decision, axis).inputs
    told = []
    for name, used in zip(node.operands(), types, strict=False):
        if graph.nodes[name].kind == "parameter":
            stored = decision.inputs[name][axis]
            label = graph.nodes[name].target.rsplit(".", 1)[-1]
            told.append(f"{label} {stored}" if stored == used else f"{label} {stored} as {used}")
    values = [str(used) for name, used in zip(node.operands(), types, strict=False) if name not in parameters]
    output = _strategy(node, graph, decision, axis).output
    moves = f"{', '.join(dict.fromkeys(values))} -> {output}"
    return (_name(node, graph, parameters), _verb(node, graph, types), f"{axis} {moves}", ", ".join(told))


def _verb(node: Node, graph: OpGraph, types: tuple[SpmdType, ...]) -> str:
    """How the operator is split, in the words of the literature."""
    first = next(iter(zip(node.operands(), types, strict=False)), None)
    if first is None:
        return ""
    operand, kind = graph.nodes[first[0]], first[1]
    weights = [
        kind for name, kind in zip(node.operands(), types, strict=False) if graph.nodes[name].kind == "parameter"
    ]
    split = next((weight for weight in weights if weight.kind == "S"), None)
    if node.op == LOSS:
        return "vocabulary" if kind.kind == "S" and kind.dim == _last_dim(operand) else _plain(operand, kind)
    if node.op == ATTENTION:
        return "heads" if kind.kind == "S" and kind.dim == _last_dim(operand) - 2 else _plain(operand, kind)
    if node.op == "aten.embedding" and split:
        return "vocabulary" if split.dim == 0 else "features"
    if split:
        outputs = {"aten.linear": 0}.get(node.op, _last_dim(graph.nodes[node.operands()[-1]]))
        return "column" if split.dim == outputs else "row"
    values = [
        (graph.nodes[name], kind)
        for name, kind in zip(node.operands(), types, strict=False)
        if graph.nodes[name].kind != "parameter"
    ]
    return _plain(*values[0]) if values else "whole"


def _plain(node: Node, kind: SpmdType) -> str:
    if kind.kind != "S":
        return "whole"
    return "sequence" if _splits_sequence(node, kind) else f"dim {kind.dim}"


def _name(node: Node, graph: OpGraph, parameters: list[str]) -> str:
    """The operator's place: the module that owns its first parameter, else the module or operator itself."""
    if parameters:
        target = graph.nodes[parameters[0]].target
        return target.rpartition(".")[0] or target
    return {ATTENTION: "attention", LOSS: "loss"}.get(node.op, node.module or node.name)


def _collective_lines(graph: OpGraph, decision: BlockDecision) -> Iterator[str]:
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    for conversion in decision.conversions:
        node = graph.nodes[conversion.tensor]
        for axis, step in path(conversion.source, conversion.target, node.meta.requires_grad):
            forward[f"{axis} {step.forward}"] += step.forward in COMMUNICATES
            backward[f"{axis} {step.backward}"] += step.backward in COMMUNICATES
    for node, axis in ((node, axis) for node in graph.of("op") for axis in split_axes(decision)):
        for inner in _strategy(node, graph, decision, axis).inner:
            (backward if inner.backward else forward)[f"{axis} {inner.collective}"] += 1
    for name, counts in (("forward", forward), ("backward", backward)):
        told = ", ".join(f"{count} {what.replace('_', '-')}" for what, count in sorted(counts.items()) if count)
        yield f"collectives {name}: {told or 'none'}"


def _strategy(node: Node, graph: OpGraph, decision: BlockDecision, axis: str) -> Strategy:
    return strategy_of(node, graph, decision.strategies[node.name][axis])


def _splits_sequence(node: Node, kind: SpmdType) -> bool:
    return kind.kind == "S" and node.meta.shape[kind.dim] == SEQ


def _last_dim(node: Node) -> int:
    return len(node.meta.shape) - 1
