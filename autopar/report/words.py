"""A block's sharding in words: what each operator with parameters does on each model axis, and what moves.

Axis names are derived from the choices, never given: an axis on which weights are split is tensor parallel, one on
which the values between blocks are split by sequence is sequence parallel, and so on (`axis_words`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from autopar.graph.ir import BlockKind, ModelGraph, Node, OpGraph
from autopar.graph.size import BATCH, SEQ
from autopar.sharding.conversions import COMMUNICATES, path
from autopar.sharding.decision import BlockDecision
from autopar.sharding.layout import I, SpmdType
from autopar.sharding.rules import Strategy, strategy_of

ATTENTION = "aten.scaled_dot_product_attention"
EMBEDDING = "aten.embedding"
LOSS = "autopar.cross_entropy"
CONTEXT = "cp"


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
    order = (
        "tensor parallel",
        "sequence parallel",
        "context (keys gathered) parallel",
        "context (all-to-all) parallel",
        "context (ring) parallel",
        "vocabulary parallel",
    )
    return tuple(word for word in order if word in found)


def _words_of_kind(graph: OpGraph, decision: BlockDecision, axis: str) -> set[str]:
    if axis == CONTEXT:
        return {_word_of_op(node, graph, decision, axis) for node in graph.of("op") if node.op == ATTENTION} - {""}
    handed = (node for node in graph.of("input") if node.meta.requires_grad)
    split = any(_splits_sequence(node, decision.inputs[node.name][axis]) for node in handed)
    words = {_word_of_op(node, graph, decision, axis) for node in graph.of("op") if node.operands()}
    return (words | {"sequence parallel"} if split else words) - {""}


def _word_of_op(node: Node, graph: OpGraph, decision: BlockDecision, axis: str) -> str:
    use = _use(node, graph, decision, axis)
    if node.op == LOSS:
        return "vocabulary parallel" if _verb(node, use) == "vocabulary" else ""
    if node.op == ATTENTION:
        context = {"sequence": "context (keys gathered) parallel", "ring": "context (ring) parallel"}
        if axis == CONTEXT:
            context["heads"] = "context (all-to-all) parallel"
        return context.get(_verb(node, use), "")
    split = [used for _, _, used in use.weights if used.kind == "S"]
    if not split:
        return ""
    return "vocabulary parallel" if node.op == EMBEDDING and split[0].dim == 0 else "tensor parallel"


def block_lines(kind: BlockKind, decision: BlockDecision) -> tuple[str, ...]:
    """One line per operator that has parameters (and attention, loss), then the collectives of one pass."""
    axes = split_axes(decision)
    if not axes:
        return ()
    rows = [row for node in kind.graph.of("op") for axis in axes if (row := _row(node, kind.graph, decision, axis))]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)) for row in rows]
    return (*(line.rstrip() for line in lines), *_collective_lines(kind.graph, decision))


def operator_name(node: Node, graph: OpGraph) -> str:
    """What reports call an operator: the module that owns its first parameter, "attention", "loss", else its node."""
    use = _use_under(node, graph, strategy_of(node, graph, "R"))
    named = use.values and (use.weights or node.op in (ATTENTION, LOSS))
    return _name(node, use) if named else node.name


def strategy_words(node: Node, graph: OpGraph, strategy: Strategy) -> str:
    """A strategy on one axis, such as ``column n: R, S(0) -> S(2)``: how it splits, the factor, the types it reads and
    makes."""
    types = f"{', '.join(map(str, strategy.inputs))} -> {strategy.output}"
    if strategy.name in ("R", "I"):
        return f"whole: {types}"
    if strategy.extent is None:
        return f"summands: {types}"
    use = _use_under(node, graph, strategy)
    verb = _verb(node, use)
    return f"{'split' if verb == 'whole' else verb} {strategy.name}: {types}"


@dataclass(frozen=True, slots=True)
class _Use:
    """What an operator reads on one axis: other values with their types; parameters as (operand, parameter, type)."""

    values: tuple[tuple[Node, SpmdType], ...]
    weights: tuple[tuple[Node, Node, SpmdType], ...]


def _use(node: Node, graph: OpGraph, decision: BlockDecision, axis: str) -> _Use:
    return _use_under(node, graph, _strategy(node, graph, decision, axis))


def _use_under(node: Node, graph: OpGraph, strategy: Strategy) -> _Use:
    values, weights = [], []
    for name, kind in zip(node.operands(), strategy.inputs, strict=True):
        parameter = _parameter(graph, name)
        if parameter is None:
            values.append((graph.nodes[name], kind))
        else:
            weights.append((graph.nodes[name], parameter, kind))
    return _Use(tuple(values), tuple(weights))


def _parameter(graph: OpGraph, name: str) -> Node | None:
    """The parameter that ``name`` is, or is a view of (a transposed weight)."""
    node = graph.nodes[name]
    while node.kind == "op" and len(node.operands()) == 1:
        node = graph.nodes[node.operands()[0]]
    return node if node.kind == "parameter" else None


def _row(node: Node, graph: OpGraph, decision: BlockDecision, axis: str) -> tuple[str, str, str, str] | None:
    use = _use(node, graph, decision, axis)
    if not use.values or not (use.weights or node.op in (ATTENTION, LOSS)):
        return None
    if axis == CONTEXT and node.op != ATTENTION:
        return None  # everything is split by sequence there, and no weight is
    told = []
    for operand, parameter, used in use.weights:
        stored = decision.inputs[parameter.name][axis]
        same = stored == used if operand is parameter else stored.kind == used.kind
        told.append(f"{parameter.target.rsplit('.', 1)[-1]} {stored}" + ("" if same else f" as {used}"))
    reads = ", ".join(dict.fromkeys(str(kind) for _, kind in use.values))
    output = _strategy(node, graph, decision, axis).output
    return _name(node, use), _verb(node, use), f"{axis} {reads} -> {output}", ", ".join(told)


def _verb(node: Node, use: _Use) -> str:
    """How the operator is split, in the words of the literature."""
    value, kind = use.values[0] if use.values else (node, I)
    split = next(((operand, used) for operand, _, used in use.weights if used.kind == "S"), None)
    if node.op == LOSS and kind.kind == "S" and kind.dim == _last_dim(value):
        return "vocabulary"
    if node.op == ATTENTION and kind.kind == "S" and kind.dim == _last_dim(value) - 2:
        return "heads"
    if node.op == ATTENTION and kind.kind == "S" and kind.dim == _last_dim(value) - 1 and use.values[1][1] == kind:
        return "ring"
    if node.op == EMBEDDING and split:
        return "vocabulary" if split[1].dim == 0 else "features"
    if node.op == "aten.linear" and split:
        return "column" if split[1].dim == 0 else "row"
    return _plain(value, kind)


def _plain(node: Node, kind: SpmdType) -> str:
    if kind.kind != "S":
        return "whole"
    if node.meta.shape[kind.dim] == BATCH:
        return "batch"
    return "sequence" if _splits_sequence(node, kind) else f"dim {kind.dim}"


def _name(node: Node, use: _Use) -> str:
    """The operator's place: the module that owns its first parameter, else what it is."""
    if use.weights:
        target = use.weights[0][1].target
        return target.rpartition(".")[0] or target
    return {ATTENTION: "attention", LOSS: "loss"}[node.op]


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
