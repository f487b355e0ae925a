"""Every rule of the table, proved by execution on shards, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from rule_examples import Example, examples_of

from autopar.graph.ir import Node, OpGraph
from autopar.sharding.execute import run_op
from autopar.sharding.layout import Layout
from autopar.sharding.local import shard, split_order, unshard
from autopar.sharding.rules import RULES, Strategy, divides, has_rule, strategies_of
from autopar.sharding.simulate import SimulatedWorld

EXAMPLES = [example for entry in RULES.values() for example in examples_of(entry)]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64; absolute where the wanted is zero."""
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / (wanted.norm() if wanted.norm() > 0 else 1.0))


def layout_of(choice: dict[str, Strategy], pick) -> Layout:
    return Layout(tuple((axis, pick(choice[axis])) for axis in split_order(choice)))


def prove(
    example: Example, choice: dict[str, Strategy], axes: dict[str, int], dtype: torch.dtype = torch.float64
) -> None:
    """Shard as the strategies claim, run on every rank, recombine: output and gradients are those of the whole."""
    node, _, whole = example.build()
    limit = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    generator = torch.Generator().manual_seed(1)
    whole = [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in whole]
    world = SimulatedWorld(axes)
    (wanted,) = run_op(node, {}, [[x] for x in whole], SimulatedWorld({}), 1, 1, dtype)
    layouts = [layout_of(choice, lambda s, i=i: s.inputs[i]) for i in range(len(whole))]
    local = [
        [part.requires_grad_(x.requires_grad) for part in shard(x.detach(), layout, axes, generator=generator)]
        for x, layout in zip(whole, layouts, strict=True)
    ]
    found = run_op(node, choice, local, world, 1, 1, dtype)
    out = layout_of(choice, lambda s: s.output)
    assert error(unshard(found, out, axes), wanted) <= limit
    if all(kind.kind in "RI" for _, kind in out.types):
        assert all(error(other, wanted) <= limit for other in found)
    if not wanted.requires_grad:
        return
    grad = torch.randn(wanted.shape, generator=generator).to(wanted.dtype)
    gradient_layout = Layout(tuple((axis, kind.gradient) for axis, kind in out.types))
    leaves = [x for x in whole if x.requires_grad]
    expected = torch.autograd.grad(wanted, leaves, grad)
    torch.autograd.backward(found, shard(grad, gradient_layout, axes, generator=generator))
    expected_of = dict(zip(map(id, leaves), expected, strict=True))
    for x, parts, layout in zip(whole, local, layouts, strict=True):
        if x.requires_grad:
            grads = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
            back = Layout(tuple((axis, kind.gradient) for axis, kind in layout.types))
            assert error(unshard(grads, back, axes), expected_of[id(x)]) <= limit
            if all(kind.kind in "RI" for _, kind in back.types):
                assert all(error(other, expected_of[id(x)]) <= limit for other in grads)


def test_every_rule_has_examples() -> None:
    covered = {example.op for example in EXAMPLES}
    assert covered == set(RULES)
    for example in EXAMPLES:
        node, graph, _ = example.build()
        assert has_rule(node, graph), example


def check(example: Example, choice: dict[str, Strategy], axes: dict[str, int], dtype: torch.dtype) -> None:
    try:
        prove(example, choice, axes, dtype)
    except Exception as problem:
        chosen = "; ".join(f"{axis}={axes[axis]} {strategy}" for axis, strategy in choice.items())
        raise AssertionError(f"{example} under {chosen}: {problem}") from problem


@pytest.mark.parametrize("op", sorted(RULES))
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
    """Every pair of strategies on axes of 2 x 2 ranks, the same factor twice included."""
    for example in examples_of(RULES[op])[:3]:
        node, graph, _ = example.build()
        for cp, tp in itertools.product(strategies_of(node, graph), repeat=2):
            if both_divide(node, graph, cp, tp):
                check(example, {"cp": cp, "tp": tp}, {"cp": 2, "tp": 2}, torch.float64)


def both_divide(node: Node, graph: OpGraph, first: Strategy, second: Strategy) -> bool:
    if first.name == second.name:
        return divides(node, graph, first, 4, 1, 1)
    return divides(node, graph, first, 2, 1, 1) and divides(node, graph, second, 2, 1, 1)
