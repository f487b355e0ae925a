"""Whether a rule is right: the operator on real shards, recombined as the rule claims, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autopar.errors import VerificationError
from autopar.graph.ir import Node, OpGraph, Ref, TensorMeta, substitute
from autopar.graph.ops import callable_of
from autopar.sharding.execute import run_op
from autopar.sharding.layout import Layout, SpmdType
from autopar.sharding.local import shard, split_order, unshard
from autopar.sharding.rules.strategies import Strategy
from autopar.sharding.simulate import SimulatedWorld

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def call_node(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Node, OpGraph, list[torch.Tensor]]:
    """One call of ``op`` on tensors, as a node of a graph, and the values of its operands in order."""
    values: list[torch.Tensor] = []
    nodes: dict[str, Node] = {}

    def place(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = f"x{len(values)}"
            values.append(value)
            nodes[name] = Node(name, "input", _meta(value, value.is_floating_point()), target=name)
            return Ref(name)
        return tuple(place(item) for item in value) if isinstance(value, tuple | list) else value

    placed, named = place(tuple(args)), {key: place(value) for key, value in kwargs.items()}
    rest = iter(values)
    given, options = substitute((placed, named), lambda _: next(rest))
    out = callable_of(op)(*given, **options)
    if not isinstance(out, torch.Tensor):
        raise VerificationError(f"{op} returns a {type(out).__name__}; a rule is for operators that return one tensor")
    grad = out.is_floating_point() and any(value.is_floating_point() for value in values)
    nodes["y"] = Node("y", "op", _meta(out, grad), op, placed, named)
    return nodes["y"], OpGraph(nodes, ("y",)), values


def _meta(value: torch.Tensor, grad: bool) -> TensorMeta:
    dtype = "compute" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
    return TensorMeta(tuple(value.shape), dtype, grad)


def prove(
    node: Node,
    whole: Sequence[torch.Tensor],
    choice: Mapping[str, Strategy],
    axes: Mapping[str, int],
    dtype: torch.dtype = torch.float64,
) -> None:
    """Shard as the strategies claim, run on every rank, recombine: output and gradients are those of the whole.

    ``whole``: the operands of ``node``. Raises VerificationError saying what differs.
    """
    limit, generator = TOLERANCE[dtype], torch.Generator().manual_seed(1)
    whole = [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in whole]
    world = SimulatedWorld(axes)
    (wanted,) = run_op(node, {}, [[x] for x in whole], SimulatedWorld({}), 1, 1, dtype)
    layouts = [_layout(choice, lambda s, i=i: s.inputs[i]) for i in range(len(whole))]  # type: ignore[misc]
    local = [
        [part.requires_grad_(x.requires_grad) for part in shard(x.detach(), layout, axes, generator=generator)]
        for x, layout in zip(whole, layouts, strict=True)
    ]
    found = run_op(node, choice, local, world, 1, 1, dtype)
    out = _layout(choice, lambda s: s.output)
    _compare("the output", found, wanted, out, axes, limit)
    if not wanted.requires_grad:
        return
    grad = torch.randn(wanted.shape, generator=generator).to(wanted.dtype)
    gradient_layout = out.gradient
    leaves = [x for x in whole if x.requires_grad]
    expected = torch.autograd.grad(wanted, leaves, grad)
    torch.autograd.backward(found, shard(grad, gradient_layout, axes, generator=generator))
    expected_of = dict(zip(map(id, leaves), expected, strict=True))
    for index, (x, parts, layout) in enumerate(zip(whole, local, layouts, strict=True)):
        if x.requires_grad:
            grads = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
            what = f"the gradient of operand {index}"
            _compare(what, grads, expected_of[id(x)], layout.gradient, axes, limit)


def _layout(choice: Mapping[str, Strategy], pick: Callable[[Strategy], SpmdType]) -> Layout:
    return Layout(tuple((axis, pick(choice[axis])) for axis in split_order(choice)))


def _compare(
    what: str,
    parts: Sequence[torch.Tensor],
    wanted: torch.Tensor,
    layout: Layout,
    axes: Mapping[str, int],
    limit: float,
) -> None:
    whole = unshard(parts, layout, axes)
    same = parts if all(kind.kind in "RI" for _, kind in layout.types) else ()
    for found in (whole, *same):
        if found.shape != wanted.shape:
            raise VerificationError(f"{what} has shape {tuple(found.shape)} for {tuple(wanted.shape)}")
        if not (error := _error(found, wanted)) <= limit:
            raise VerificationError(f"{what} is off by {error:.1e} (at most {limit:.0e})")


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64; absolute where the wanted is zero."""
    found, wanted = (torch.view_as_real(x) if x.is_complex() else x for x in (found.detach(), wanted.detach()))
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / (wanted.norm() if wanted.norm() > 0 else 1.0))
