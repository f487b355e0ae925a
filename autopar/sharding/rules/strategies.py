"""Strategies: what one operator may do on one mesh axis.

* "R": every operand and the output replicated; "I": all invariant. Both run the whole operator on every rank; they
  differ in what the ranks hold of the gradients.
* a factor's name: the factor is split; tensors without it are R, an output without it is P.
  "n/3": split within each of 3 blocks (see `autopar.sharding.rules.blocks`).
* "P", or "P0", "P1", ... if there are several: the operator is linear in some operands, which are partial; so is
  the output.

An operator none of whose operands has a gradient has no "I": without gradient R and I are one type, and every consumer
may read either as the other, free of charge (`autopar.sharding.conversions.plain`). Types are written out all the same.
An operator without a rule has "R" and "I" only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autopar.errors import UnsupportedError
from autopar.graph.ir import Node, OpGraph
from autopar.graph.size import Size, divide, size_at
from autopar.sharding.factors import Inner, Rule
from autopar.sharding.layout import I, P, R, SpmdType
from autopar.sharding.rules.blocks import GraphBlocks, graph_blocks


@dataclass(frozen=True, slots=True)
class Strategy:
    """One choice on one axis: the types of the operands (in the order of `Node.operands`) and of the output.

    ``variant`` names the local implementation when it is not the operator itself on local shards: "vocab" for a split
    vocabulary, "context" for causal attention with queries split by position, "ring" and "causal ring" for attention
    whose keys and values go round the ranks. ``inner``: the collectives inside it, over this axis. ``extent``: the
    size of the factor that is split (None: none is), which the axis size must divide unless the parts may be ``uneven``
    (chunks of the size rounded up, fewer for the last rank, none for no rank).
    """

    name: str
    inputs: tuple[SpmdType, ...]
    output: SpmdType
    variant: str = ""
    inner: tuple[Inner, ...] = ()
    extent: int | Size | None = field(default=None)
    uneven: bool = False

    @property
    def by_sequence(self) -> bool:
        """Whether the factor that is split is (a multiple of) the sequence."""
        return isinstance(self.extent, Size) and all(b == 0 and s > 0 for (b, s), _ in self.extent.terms)

    @property
    def is_ring(self) -> bool:
        """Whether it is attention whose keys and values go round the ranks of one axis."""
        return self.variant.endswith("ring")

    @property
    def by_position(self) -> bool:
        """Whether it is causal attention with queries split by position: even work for all ranks in balanced order."""
        return self.variant in ("context", "causal ring")

    def __str__(self) -> str:
        types = ", ".join(map(str, self.inputs))
        return f"{self.name}: {types} -> {self.output}" + (f" [{self.variant}]" if self.variant else "")


def has_rule(node: Node, graph: OpGraph) -> bool:
    """Whether the operator call has a rule; without one it runs replicated, and the user should be told."""
    return graph_blocks(graph).rules[node.name] is not None


def strategies_of(node: Node, graph: OpGraph) -> tuple[Strategy, ...]:
    """Every strategy of an op node on one axis, whatever its size; `divides` tells which an axis admits."""
    blocks = graph_blocks(graph)
    if node.name not in blocks.strategies:
        blocks.strategies[node.name] = _find(node, graph, blocks)
    return blocks.strategies[node.name]


def _find(node: Node, graph: OpGraph, blocks: GraphBlocks) -> tuple[Strategy, ...]:
    count = len(node.operands())
    found = [Strategy("R", (R,) * count, R)]
    if any(graph.nodes[name].meta.requires_grad for name in node.operands()):
        found.append(Strategy("I", (I,) * count, I))
    rule = blocks.rules[node.name]
    if rule is None:
        return tuple(found)
    return tuple(_distinct([*found, *_splits(node, rule, blocks), *_together(rule), *_partial(rule, count)]))


def ring_axis(choice: Mapping[str, Strategy]) -> str:
    """The axis round which keys and values go under a strategy on each axis; empty if they do not."""
    return next((axis for axis, strategy in choice.items() if strategy.is_ring), "")


def strategy_of(node: Node, graph: OpGraph, name: str) -> Strategy:
    """The strategy called ``name``. Raises UnsupportedError naming the ones there are."""
    strategies = strategies_of(node, graph)
    for strategy in strategies:
        if strategy.name == name:
            return strategy
    known = ", ".join(strategy.name for strategy in strategies)
    raise UnsupportedError(f"{node.name} ({node.op}) has no strategy {name!r}; it has {known}")


def divides(node: Node, graph: OpGraph, strategy: Strategy, axis_size: int, batch: int, seq: int) -> bool:
    """Whether an axis (or a product of axes) of ``axis_size`` ranks can split the strategy's factor evenly, for
    ``batch`` samples of ``seq`` positions."""
    return strategy.extent is None or size_at(strategy.extent, batch, seq) % axis_size == 0


def _splits(node: Node, rule: Rule, blocks: GraphBlocks) -> list[Strategy]:
    found = []
    for factor in rule.splittable():
        variant = rule.variants.get(factor)
        for count in blocks.of(node.name, factor) if variant is None else (1,):
            inputs = [rule.split_type(dims, factor, count) for dims in rule.operands]
            output = rule.split_type(rule.output, factor, count)
            if factor in rule.sums:
                inputs = [
                    P if index in rule.once and rule.position(rule.operands[index], factor) is None else kind
                    for index, kind in enumerate(inputs)
                ]
                output = P
            if variant is not None and variant.output is not None:
                output = variant.output
            name = factor if count == 1 else f"{factor}/{count}"
            extent = divide(rule.sizes[factor], count)
            inner = variant.inner if variant else ()
            uneven = factor in rule.uneven and count == 1 and isinstance(extent, int)
            label = variant.name if variant else ""
            found.append(Strategy(name, tuple(inputs), output, label, inner, extent, uneven))
    return found


def _together(rule: Rule) -> list[Strategy]:
    found = []
    for name, each in rule.together.items():
        types = []
        for dims in (*rule.operands, rule.output):
            split = [factor for factor in each.factors if rule.position(dims, factor) is not None]
            types.append(rule.split_type(dims, split[0]) if split else R)
        extent = rule.sizes[each.factors[0]]
        found.append(Strategy(name, tuple(types[:-1]), types[-1], each.variant.name, each.variant.inner, extent))
    return found


def _partial(rule: Rule, count: int) -> list[Strategy]:
    found = [tuple(P if index in group else R for index in range(count)) for group in rule.linear]
    names = ["P"] if len(found) == 1 else [f"P{index}" for index in range(len(found))]
    return [Strategy(name, inputs, P) for name, inputs in zip(names, found, strict=True)]


def _distinct(strategies: list[Strategy]) -> list[Strategy]:
    """Without repeats of the same types: the first name stays."""
    kept: dict[tuple[object, ...], Strategy] = {}
    for strategy in strategies:
        kept.setdefault((strategy.inputs, strategy.output, strategy.variant), strategy)
    return list(kept.values())
