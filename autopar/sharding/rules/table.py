"""The rule table of all families, and the rule of one node."""

from __future__ import annotations

from autopar.graph.ir import Node, OpGraph
from autopar.graph.leaves import FOUND
from autopar.sharding.factors import Mismatch, Rule
from autopar.sharding.rules import (
    attention,
    convolution,
    elementwise,
    experts,
    indexing,
    loss,
    matmul,
    norms,
    recurrent,
    reductions,
    scans,
    shapes,
)
from autopar.sharding.rules.entry import Call, Entry

_FAMILIES = (
    matmul,
    attention,
    experts,
    norms,
    loss,
    indexing,
    reductions,
    elementwise,
    shapes,
    convolution,
    scans,
    recurrent,
)

RULES: dict[str, Entry] = {entry.op: entry for family in _FAMILIES for entry in family.ENTRIES}
"""Every operator's entry, by canonical name."""


def rule_of(node: Node, graph: OpGraph) -> Rule | None:
    """The rule of one operator call; None for an operator, or a form of it, that has none: it runs replicated."""
    entry = RULES.get(node.op)
    if entry is None and node.op in FOUND:
        entry = Entry(node.op, (FOUND[node.op],))
    if entry is None:
        return None
    try:
        return entry.rule(Call.of(node, graph))
    except Mismatch:
        return None
