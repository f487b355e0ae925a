"""What a line of the rule table is: an operator, its annotation (or how to compute its rule), and its linearity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autopar.graph.ir import Node, OpGraph, Ref, TensorMeta
from autopar.graph.size import Size
from autopar.sharding.factors import Annotation, Mismatch, Rule, Together, Variant


@dataclass(frozen=True, slots=True)
class Call:
    """One operator call as rules see it: the node, and the metas of its operands and of its output."""

    node: Node
    operands: tuple[TensorMeta, ...]

    @staticmethod
    def of(node: Node, graph: OpGraph) -> Call:
        return Call(node, tuple(graph.nodes[name].meta for name in node.operands()))

    @property
    def shapes(self) -> tuple[tuple[int | Size, ...], ...]:
        return tuple(meta.shape for meta in self.operands)

    @property
    def output(self) -> tuple[int | Size, ...]:
        return self.node.meta.shape

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or by keyword."""
        return self.node.args[index] if index < len(self.node.args) else self.node.kwargs.get(name, default)

    def is_tensor(self, index: int) -> bool:
        """Whether positional argument ``index`` is a tensor."""
        return index < len(self.node.args) and isinstance(self.node.args[index], Ref)


Linear = str | Callable[[Call], str]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table.

    ``texts``: annotations, the first that fits the call holds; or ``compute``: makes the rule or its annotation from
    the call. ``linear``: sets of operand positions that may be partial together, as digits ("02 12"), or a function of
    the call. ``once``: positions of biases. ``variants``: local implementations other than the operator itself, by
    factor. ``uneven``: the factors that may be cut into unequal parts, by name; "*" for all. ``together``: factors
    that may be split at once, by the name of the strategy, from the call and its rule.
    """

    op: str
    texts: tuple[str, ...] = ()
    compute: Callable[[Call], Rule | str] | None = None
    linear: Linear = ""
    once: str = ""
    variants: Callable[[Call], dict[str, Variant]] | None = None
    uneven: str = ""
    together: Callable[[Call, Rule], dict[str, Together]] | None = None

    def rule(self, call: Call) -> Rule:
        """The rule for one call. Raises Mismatch if the call is of a form the entry does not cover."""
        rule = self._table(call)
        count = len(call.operands)
        text = self.linear if isinstance(self.linear, str) else self.linear(call)
        sets = (frozenset(int(digit) for digit in group if int(digit) < count) for group in text.split())
        return replace(
            rule,
            linear=rule.linear or tuple(dict.fromkeys(group for group in sets if group)),
            once=frozenset(int(digit) for digit in self.once if int(digit) < count),
            variants=self.variants(call) if self.variants else {},
            uneven=frozenset(rule.sizes if self.uneven == "*" else self.uneven.split()),
            together=self.together(call, rule) if self.together else {},
        )

    def _table(self, call: Call) -> Rule:
        if self.compute is not None:
            made = self.compute(call)
            return made if isinstance(made, Rule) else bind((made,), call)
        return bind(self.texts, call)


def bind(texts: Sequence[str], call: Call) -> Rule:
    """The first of the annotations that fits the call. Raises Mismatch with the last one's reason."""
    reason = Mismatch(f"{call.node.op} has no annotation")
    for text in texts:
        try:
            return Annotation.parse(text).bind(call.shapes, call.output)
        except Mismatch as mismatch:
            reason = mismatch
    raise reason


def table(lines: str, **common: Any) -> list[Entry]:
    """Entries from lines ``op1 op2: annotation | other annotation``; ``common`` holds for all of them."""
    entries = []
    for line in filter(None, (line.strip() for line in lines.splitlines())):
        ops, _, annotations = line.partition(":")
        texts = tuple(text.strip() for text in annotations.split("|"))
        entries += [Entry(op, texts, **common) for op in ops.split()]
    return entries
