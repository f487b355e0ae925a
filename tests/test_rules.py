"""Every rule of the table, proved by execution on shards, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from rule_examples import Example, examples_of

from autopar.codegen.same_numbers import SameNumbers
from autopar.graph.ir import Node, OpGraph
from autopar.sharding.check import refusal
from autopar.sharding.custom import MODULES
from autopar.sharding.prove_rule import prove
from autopar.sharding.rules import RULES, Strategy, divides, has_rule, strategies_of

TABLE = {op: entry for op, entry in RULES.items() if op not in MODULES}  # not what other tests registered
EXAMPLES = [example for entry in TABLE.values() for example in examples_of(entry)]


def test_every_rule_has_examples() -> None:
    covered = {example.op for example in EXAMPLES}
    assert covered == set(TABLE)
    for example in EXAMPLES:
        node, graph, _ = example.build()
        assert has_rule(node, graph), example


def check(example: Example, choice: dict[str, Strategy], axes: dict[str, int], dtype: torch.dtype) -> None:
    try:
        node, _, whole = example.build()
        with SameNumbers():  # what is drawn apart cannot be compared
            prove(node, whole, choice, axes, dtype)
    except Exception as problem:
        chosen = "; ".join(f"{axis}={axes[axis]} {strategy}" for axis, strategy in choice.items())
        raise AssertionError(f"{example} under {chosen}: {problem}") from problem


@pytest.mark.parametrize("op", sorted(TABLE))
def test_rule_holds_on_shards(op: str) -> None:
    """Every strategy of every example of the operator, on 2 and 4 ranks."""
    proved = 0
    for example in examples_of(RULES[op]):
        node, graph, _ = example.build()
        for ranks, strategy in itertools.product((2, 4), strategies_of(node, graph)):
            if divides(node, graph, strategy, ranks, 1, 1):
                check(example, {"tp": strategy}, {"tp": ranks}, torch.float64)
                proved += 1
    assert proved


@pytest.mark.parametrize(
    "op", ["aten.linear", "aten.scaled_dot_product_attention", "aten.layer_norm", "autopar.cross_entropy", "aten.add"]
)
def test_rule_holds_in_float32(op: str) -> None:
    for example in examples_of(RULES[op]):
        node, graph, _ = example.build()
        for strategy in strategies_of(node, graph):
            if divides(node, graph, strategy, 2, 1, 1):
                check(example, {"tp": strategy}, {"tp": 2}, torch.float32)


_PAIRED = """
aten.linear aten.matmul aten.scaled_dot_product_attention aten.view aten.flatten aten.unflatten aten.expand aten.slice
aten.cat aten.sum aten.mul aten.add aten.embedding autopar.cross_entropy aten.repeat autopar.experts
"""


@pytest.mark.parametrize("op", _PAIRED.split())
def test_rule_holds_on_two_axes(op: str) -> None:
    """Every pair of strategies on axes of 2 x 2 ranks that is not refused, the same factor twice included."""
    for example in examples_of(RULES[op])[:3]:
        node, graph, _ = example.build()
        for cp, tp in itertools.product(strategies_of(node, graph), repeat=2):
            if both_divide(node, graph, cp, tp) and not refusal(node, graph, {"cp": cp, "tp": tp}, {"cp": 2, "tp": 2}):
                check(example, {"cp": cp, "tp": tp}, {"cp": 2, "tp": 2}, torch.float64)


def both_divide(node: Node, graph: OpGraph, first: Strategy, second: Strategy) -> bool:
    if first.name == second.name:
        return divides(node, graph, first, 4, 1, 1)
    return divides(node, graph, first, 2, 1, 1) and divides(node, graph, second, 2, 1, 1)
