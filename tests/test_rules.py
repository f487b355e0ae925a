"""Every rule of the table, proved by execution on shards, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from rule_examples import Example, examples_of

from autopar.sharding.layout import Layout
from autopar.sharding.local import shard, unshard
from autopar.sharding.rules import RULES, Strategy, divides, has_rule, strategies_of
from autopar.sharding.execute import run_op
from autopar.sharding.simulate import SimulatedWorld

EXAMPLES = [example for entry in RULES.values() for example in examples_of(entry)]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64; absolute where the wanted is zero."""
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / (wanted.norm() if wanted.norm() > 0 else 1.0))


def layout_of(choice: dict[str, Strategy], pick) -> Layout:
    return Layout(tuple((axis, pick(strategy)) for axis, strategy in choice.items()))


def prove(example: Example, choice: dict[str, Strategy], axes: dict[str, int]) -> None:
    """Shard as the strategies claim, run on every rank, recombine as they claim: output and gradients are the whole's."""
    node, _, whole = example.build()
    generator = torch.Generator().manual_seed(1)
    whole = [x.requires_grad_() if x.is_floating_point() else x for x in whole]
    world = SimulatedWorld(axes)
    (wanted,) = run_op(node, {}, [[x] for x in whole], SimulatedWorld({}), 1, 1, torch.float64)
    layouts = [layout_of(choice, lambda s, i=i: s.inputs[i]) for i in range(len(whole))]
    local = [
        [part.requires_grad_(x.requires_grad) for part in shard(x.detach(), layout, axes, generator=generator)]
        for x, layout in zip(whole, layouts, strict=True)
    ]
    found = run_op(node, choice, local, world, 1, 1, torch.float64)
    out = layout_of(choice, lambda s: s.output)
    assert error(unshard(found, out, axes), wanted) <= 1e-12
    if all(kind.kind in "RI" for _, kind in out.types):
        assert all(error(other, wanted) <= 1e-12 for other in found)
    if not wanted.requires_grad:
        return
    grad = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    gradient_layout = Layout(tuple((axis, kind.gradient) for axis, kind in out.types))
    leaves = [x for x in whole if x.requires_grad]
    expected = torch.autograd.grad(wanted, leaves, grad)
    torch.autograd.backward(found, shard(grad, gradient_layout, axes, generator=generator))
    expected_of = dict(zip(map(id, leaves), expected, strict=True))
    for x, parts, layout in zip(whole, local, layouts, strict=True):
        if x.requires_grad:
            grads = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
            back = Layout(tuple((axis, kind.gradient) for axis, kind in layout.types))
            assert error(unshard(grads, back, axes), expected_of[id(x)]) <= 1e-12
            if all(kind.kind in "RI" for _, kind in back.types):
                assert all(error(other, expected_of[id(x)]) <= 1e-12 for other in grads)


def test_every_rule_has_examples() -> None:
    covered = {example.op for example in EXAMPLES}
    assert covered == set(RULES)
    for example in EXAMPLES:
        node, graph, _ = example.build()
        assert has_rule(node, graph), example


@pytest.mark.parametrize("op", sorted(RULES))
def test_rule_holds_on_shards(op: str) -> None:
    proved = 0
    for example in examples_of(RULES[op]):
        node, graph, _ = example.build()
        for ranks, strategy in itertools.product((2, 4), strategies_of(node, graph)):
            if divides(node, graph, strategy, ranks, 1, 1):
                try:
                    prove(example, {"tp": strategy}, {"tp": ranks})
                except Exception as problem:
                    raise AssertionError(f"{example} under {strategy} on {ranks} ranks: {problem}") from problem
                proved += 1
    assert proved
