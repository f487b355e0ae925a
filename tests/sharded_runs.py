"""A block's graph on one device, and under a decision on simulated ranks: the same outputs, the same gradients."""

from __future__ import annotations

import torch

from autopar.graph.ir import BlockKind, OpGraph
from autopar.sharding.check import check_decision
from autopar.sharding.decision import BlockDecision
from autopar.sharding.execute import run_sharded
from autopar.sharding.layout import Layout
from autopar.sharding.local import shard, unshard


def values_of(graph: OpGraph, batch: int, seq: int, high: int = 32) -> dict[str, torch.Tensor]:
    """Seeded values of the inputs and parameters: float64, or integers below ``high``."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for node in graph.nodes.values():
        shape = node.meta.at(batch, seq)
        if node.kind != "op" and node.meta.dtype == "int64":
            values[node.name] = torch.randint(0, high, shape, generator=generator)
        elif node.kind != "op":
            values[node.name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values


def whole_run(
    graph: OpGraph, batch: int, seq: int, high: int = 32
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The output on one device, a gradient for it, and the gradients of all inputs under it."""
    leaves = {
        n: x.requires_grad_(graph.nodes[n].meta.requires_grad) for n, x in values_of(graph, batch, seq, high).items()
    }
    plain = {node.name: {} for node in graph.of("op")}
    alone = BlockDecision("One", {}, dict.fromkeys(leaves, Layout()), plain, (), dict.fromkeys(graph.outputs, Layout()))
    ((out,),) = run_sharded(BlockKind("One", graph), alone, {n: [x] for n, x in leaves.items()}, batch, seq)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    wanted = {n: x for n, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), grad)
    return out.detach(), grad, dict(zip(wanted, grads, strict=True))


def error(found: torch.Tensor, wanted: torch.Tensor, least: float = 0.0) -> float:
    """DESIGN's measure; ``least``: what a true zero (the gradient of a key's bias) is compared with."""
    return float((found.detach() - wanted).norm()) / max(float(wanted.norm()), least)


def prove(graph: OpGraph, decision: BlockDecision, batch: int = 4, seq: int = 8, high: int = 32) -> None:
    """The decision's outputs and gradients on simulated ranks are those of one device."""
    kind = BlockKind("Drawn", graph)
    wanted, grad, grads = whole_run(graph, batch, seq, high)
    assert set(check_decision(kind, decision, batch, seq)) == set(graph.nodes)
    generator = torch.Generator().manual_seed(1)
    local = {
        name: [
            part.requires_grad_(graph.nodes[name].meta.requires_grad)
            for part in shard(x, decision.inputs[name], decision.axes, batch, seq, generator)
        ]
        for name, x in values_of(graph, batch, seq, high).items()
    }
    (found,) = run_sharded(kind, decision, local, batch, seq)
    layout = decision.outputs[graph.outputs[0]]
    assert error(unshard(found, layout, decision.axes, batch, seq), wanted) <= 1e-12
    torch.autograd.backward(found, shard(grad, layout.gradient, decision.axes, batch, seq, generator))
    least = 1e-3 * float(torch.stack([g.norm() for g in grads.values()]).norm()) / len(grads) ** 0.5
    for name, expected in grads.items():
        parts = [torch.zeros_like(x) if x.grad is None else x.grad for x in local[name]]
        back = unshard(parts, decision.inputs[name].gradient, decision.axes, batch, seq)
        assert error(back, expected, least) <= 1e-12, f"gradient of {name}"
