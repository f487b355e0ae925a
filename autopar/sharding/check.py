"""Is a block decision whole? Are its types right at every operand, its conversions reachable, its splits even?"""

from __future__ import annotations

import math
from collections.abc import Mapping

from autopar.errors import VerificationError
from autopar.graph.ir import BlockKind, Node, OpGraph
from autopar.graph.size import Size, divide, size_at
from autopar.sharding.conversions import plain, same
from autopar.sharding.decision import BlockDecision
from autopar.sharding.layout import CONTEXT, I, Layout, P, R
from autopar.sharding.local import blocks_at, least_part, produced_layouts, settled
from autopar.sharding.rules import Strategy, strategies_of


def check_decision(
    kind: BlockKind, decision: BlockDecision, batch: int | None = None, seq: int | None = None
) -> dict[str, Layout]:
    """The layout every node is produced in (inputs: arrives in), if the decision is whole.

    Checks that every op node has a known strategy on every axis, that each operand was produced in or converted to the
    layout its strategy asks for, that conversions start at what is there, that parameters are stored I or S(d) (on the
    context axis R), that outputs leave as promised, and that splits are even (those that depend on b or s when
    ``batch`` and ``seq`` are given) wherever more than the operators that take uneven parts see them. Raises
    VerificationError naming the node.
    """
    graph = kind.graph
    where = f"block kind {kind.name}"
    produced: dict[str, Layout] = {}
    held: dict[str, list[Layout]] = {}
    unknown = {c.tensor for c in decision.conversions} | set(decision.strategies) | set(decision.inputs)
    unknown -= set(graph.nodes)
    if unknown:
        raise VerificationError(
            f"{where}: the decision speaks of nodes that are not there: {', '.join(sorted(unknown))}"
        )
    for node in graph.nodes.values():
        if node.kind == "op":
            layout = _check_op(node, graph, decision, held, where, batch, seq)
        else:
            layout = _check_input(node, decision, where)
        _check_splits(node, layout, decision, where, batch, seq, frozenset(decision.axes))
        produced[node.name] = layout
        held[node.name] = [layout]
        grad = node.meta.requires_grad
        for conversion in decision.conversions:
            if conversion.tensor == node.name:
                if not _has(held[node.name], conversion.source, grad):
                    raise VerificationError(
                        f"{where}: {node.name} is converted from {conversion.source} to {conversion.target}, but "
                        f"is held as {_texts(held[node.name])} only"
                    )
                for layout in (conversion.source, conversion.target):
                    _check_splits(node, layout, decision, where, batch, seq)
                held[node.name].append(conversion.target)
    for name in graph.outputs:
        promised = decision.outputs.get(name)
        if promised is None:
            raise VerificationError(f"{where}: no layout is given for output {name}")
        if not _has(held[name], promised, graph.nodes[name].meta.requires_grad):
            raise VerificationError(f"{where}: output {name} leaves as {promised}, held as {_texts(held[name])} only")
    return produced


def operand_layouts(node: Node, graph: OpGraph, decision: BlockDecision) -> tuple[Layout, ...]:
    """The layout ``node``'s strategies ask of each operand."""
    return produced_layouts(node, chosen(node, graph, decision))[0]


def chosen(node: Node, graph: OpGraph, decision: BlockDecision) -> dict[str, Strategy]:
    """The strategy of an op node on each axis, in mesh order, its blocks `settled` for the sizes of the axes.

    Raises VerificationError for a missing or unknown one.
    """
    names = decision.strategies.get(node.name, {})
    known = {strategy.name: strategy for strategy in strategies_of(node, graph)}
    choice = {}
    for axis in decision.axes:
        if names.get(axis) not in known:
            raise VerificationError(
                f"block kind {decision.kind}: {node.name} ({node.op}) has strategy {names.get(axis)!r} on axis {axis}; "
                f"known: {', '.join(known)}"
            )
        choice[axis] = known[names[axis]]
    return settled(choice, decision.axes)


def refusal(
    node: Node,
    graph: OpGraph,
    choice: Mapping[str, Strategy],
    axes: Mapping[str, int],
    batch: int | None = None,
    seq: int | None = None,
) -> str:
    """Why an op node cannot run strategy ``choice[a]`` on each axis a together; "" if it can.

    Splits of sizes that depend on b or s are checked when ``batch`` and ``seq`` are given.
    """
    by_factor: dict[str, list[str]] = {}
    for axis, strategy in choice.items():
        by_factor.setdefault(strategy.name, []).append(axis)
    for factor, split in by_factor.items():
        extent, sizes = choice[split[0]].extent, [axes[axis] for axis in split]
        if extent is not None and _uneven(extent, math.prod(sizes), batch, seq):
            size = f"{extent} = {size_at(extent, batch, seq)}" if isinstance(extent, Size) and batch and seq else extent
            over = f"of size {size} over {math.prod(sizes)} ranks ({', '.join(split)})"
            if not choice[split[0]].uneven:
                return f"splits factor {factor} {over}: does not divide"
            if least_part(size_at(extent, 1, 1), sizes) < 1:
                return f"splits factor {factor} {over}: some would hold nothing"
    rings = [axis for axis, strategy in choice.items() if strategy.is_ring]
    if len(rings) > 1:
        return f"sends keys and values round one axis, not {' and '.join(rings)}"
    variants = {strategy.variant for strategy in choice.values() if strategy.variant}
    if len(variants) > 1:
        return f"has one local implementation only, not {' and '.join(sorted(variants))} at once"
    needs, output = produced_layouts(node, choice)
    loose = frozenset(axis for axis, strategy in choice.items() if strategy.uneven)
    for name, layout in (*zip(node.operands(), needs, strict=True), (node.name, output)):
        if not fits(graph.nodes[name].meta.shape, layout, axes, batch, seq, loose):
            return f"cannot hold {_described(graph.nodes[name])} as {layout} on {dict(axes)}"
    return ""


def _check_op(
    node: Node,
    graph: OpGraph,
    decision: BlockDecision,
    held: dict[str, list[Layout]],
    where: str,
    batch: int | None,
    seq: int | None,
) -> Layout:
    choice = chosen(node, graph, decision)
    needs, output = produced_layouts(node, choice)
    for name, need in zip(node.operands(), needs, strict=True):
        if not _has(held[name], need, graph.nodes[name].meta.requires_grad):
            raise VerificationError(
                f"{where}: {node.name} ({node.op}) needs {name} as {need}, which is held as {_texts(held[name])} only"
            )
    reason = refusal(node, graph, choice, decision.axes, batch, seq)
    if reason:
        raise VerificationError(f"{where}: {node.name} ({node.op}) {reason}")
    return output


def _check_input(node: Node, decision: BlockDecision, where: str) -> Layout:
    layout = decision.inputs.get(node.name)
    if layout is None:
        raise VerificationError(f"{where}: no layout is given for {node.kind} {node.name}")
    for axis in decision.axes:
        kind = layout[axis]
        if node.kind == "parameter" and axis == CONTEXT and plain(kind, node.meta.requires_grad) != R:
            raise VerificationError(
                f"{where}: parameter {node.target} is stored as {kind} on {axis}; context-parallel ranks hold it "
                "whole, each with its summand of the gradient: R"
            )
        stored = kind == I or (kind.kind == "S" and kind.blocks == 1) or (kind == R and not node.meta.requires_grad)
        if node.kind == "parameter" and axis != CONTEXT and not stored:
            raise VerificationError(
                f"{where}: parameter {node.target} is stored as {kind} on {axis}; only I and S(d) are"
            )
        if node.kind == "buffer" and kind == P:
            raise VerificationError(f"{where}: buffer {node.target} is stored as partial sums on {axis}")
    return layout


def _check_splits(
    node: Node,
    layout: Layout,
    decision: BlockDecision,
    where: str,
    batch: int | None,
    seq: int | None,
    loose: frozenset[str] = frozenset(),
) -> None:
    foreign = [axis for axis, _ in layout.types if axis not in decision.axes]
    if foreign:
        raise VerificationError(f"{where}: {node.name} has a layout on axis {foreign[0]}, which is not in the decision")
    if not fits(node.meta.shape, layout, decision.axes, batch, seq, loose):
        raise VerificationError(f"{where}: {_described(node)} cannot be held as {layout} on {decision.axes}")


def fits(
    shape: tuple[int | Size, ...],
    layout: Layout,
    axes: Mapping[str, int],
    batch: int | None,
    seq: int | None,
    loose: frozenset[str] = frozenset(),
) -> bool:
    """Whether a tensor of ``shape`` divides evenly as ``layout`` says, block splits nested.

    A dim of a fixed size that ``loose`` axes alone split may divide unevenly, if every rank gets a part.
    """
    for axis, kind in layout.types:
        if kind.kind != "S":
            continue
        size = shape[kind.dim] if kind.dim < len(shape) else 0
        inner = divide(size, kind.blocks) if size else None
        splits = layout.splits(kind.dim)
        if inner is None:
            return False
        if isinstance(size, int) and loose.issuperset(splits) and all(layout[other].blocks == 1 for other in splits):
            if least_part(size, [axes[other] for other in splits]) < 1:
                return False
            continue
        if _uneven(inner, axes[axis], batch, seq):
            return False
        if kind.blocks == 1 and len(splits) == 1:
            continue
        if _uneven(size, math.prod([axes[other] for other in splits]), batch, seq):
            return False
        if kind.blocks != 1 and (isinstance(kind.blocks, int) or (batch and seq)):
            try:
                blocks_at(layout, axis, axes, batch or 1, seq or 1)
            except VerificationError:
                return False
    return True


def _described(node: Node) -> str:
    return f"{node.name} [{', '.join(map(str, node.meta.shape))}]"


def _uneven(size: int | Size, ranks: int, batch: int | None, seq: int | None) -> bool:
    if isinstance(size, Size) and (batch is None or seq is None):
        return False
    return size_at(size, batch or 1, seq or 1) % ranks != 0


def _has(layouts: list[Layout], wanted: Layout, grad: bool) -> bool:
    return any(same(layout, wanted, grad) for layout in layouts)


def _texts(layouts: list[Layout]) -> str:
    return "; ".join(str(layout) or "I" for layout in layouts)
