"""The two halves of a block's backward, for schedules that run them apart: gradients of inputs, then of weights.

Torch cuts where an operator reads a parameter (`torch.distributed.pipelining._backward`): the first half goes on
without that parameter's gradient, and keeps the gradient of the operator's output for the second. So, per operator:

* seconds of the second half: what its backward takes beyond its backward with no gradient for parameters, all of it
  where it reads nothing else (a weight that is transposed or cast first);
* bytes between the halves: the outputs of operators that read a parameter, beside all that was saved.

Collectives of conversions count in the first half.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from autopar.graph.ir import BlockKind, Node
from autopar.graph.size import Size
from autopar.job import Job
from autopar.sharding.check import chosen
from autopar.sharding.decision import BlockDecision
from autopar.sharding.layout import Layout
from autopar.sharding.local import local_shape, produced_layouts
from autopar.solver.op_costs import LocalTensor, OpCosts
from autopar.solver.prices import element_bytes

Halves = tuple[float, int]
"""Seconds of the half that gives weight gradients, and bytes kept between the halves, per micro-batch."""


class HalvedBackward:
    """Halves of decisions for one job, remembered."""

    def __init__(self, ops: OpCosts) -> None:
        self.ops = ops
        self._known: dict[tuple[int, int], tuple[BlockDecision, Halves]] = {}

    def of(self, kind: BlockKind, decision: BlockDecision, batch: int) -> Halves:
        key = (id(decision), batch)
        if key not in self._known:
            self._known[key] = (decision, self._halves(kind, decision, batch))
        return self._known[key][1]

    def _halves(self, kind: BlockKind, decision: BlockDecision, batch: int) -> Halves:
        seconds, kept = 0.0, 0
        job, graph = self.ops.job, kind.graph
        for node, of_weight in _readers(kind):
            metas = [graph.nodes[name].meta for name in node.operands()]
            layouts, layout = produced_layouts(node, chosen(node, graph, decision))
            inputs = [
                _local(meta.shape, meta.dtype, held, decision, batch, job)
                for meta, held in zip(metas, layouts, strict=True)
            ]
            output = _local(node.meta.shape, node.meta.dtype, layout, decision, batch, job)
            grads = [meta.requires_grad for meta in metas]
            seconds += self.ops.seconds(node, inputs, output, grads).backward
            rest = [grad and not weight for grad, weight in zip(grads, of_weight, strict=True)]
            if any(rest):
                seconds -= self.ops.seconds(node, inputs, output, rest).backward
                kept += prod(output.shape) * output.bytes_per_element
        return seconds, kept


def sure_halves(ops: OpCosts, kind: BlockKind, batch: int, seq: int, ranks: int) -> tuple[float, float]:
    """Seconds that are surely in the first half of a block's backward, and in the second, however it is sharded over
    so many ranks: the arithmetic of operators that are bound by it even if every rank moves all of their bytes."""
    first = second = 0.0
    graph = kind.graph
    readers = {node.name: of_weight for node, of_weight in _readers(kind)}
    for node in graph.of("op"):
        metas = [graph.nodes[name].meta for name in node.operands()]
        whole = [LocalTensor(meta.at(batch, seq), element_bytes(meta.dtype, ops.job)) for meta in metas]
        output = LocalTensor(node.meta.at(batch, seq), element_bytes(node.meta.dtype, ops.job))
        grads = [meta.requires_grad for meta in metas]
        of_weight = readers.get(node.name, [False] * len(grads))
        rest = [grad and not weight for grad, weight in zip(grads, of_weight, strict=True)]
        both, one = (ops.arithmetic_seconds(node, whole, output, wanted)[1] for wanted in (grads, rest))
        if any(of_weight) and ops.moving_seconds(node, whole, output, rest) > one / ranks:
            continue
        first += one / ranks
        second += (both - one) / ranks
    return first, second


def _readers(kind: BlockKind) -> Iterator[tuple[Node, list[bool]]]:
    """Operators with a gradient for some parameter, and which of their operands come from parameters alone."""
    graph = kind.graph
    weights = {node.name for node in graph.of("parameter") if node.meta.requires_grad}
    for node in graph.of("op"):
        operands = node.operands()
        of_weight = [name in weights for name in operands]
        if not any(of_weight):
            continue
        yield node, of_weight
        grads = [graph.nodes[name].meta.requires_grad for name in operands]
        if all(weight or not grad for weight, grad in zip(of_weight, grads, strict=True)):
            activations = any(graph.nodes[name].kind in ("input", "op") and name not in weights for name in operands)
            if not activations:
                weights.add(node.name)


def _local(
    shape: tuple[int | Size, ...], dtype: str, layout: Layout, decision: BlockDecision, batch: int, job: Job
) -> LocalTensor:
    whole = tuple(size.at(batch, job.seq_len) if isinstance(size, Size) else size for size in shape)
    return LocalTensor(local_shape(whole, layout, decision.axes), element_bytes(dtype, job))
