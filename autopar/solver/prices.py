"""Seconds of what a block does on one model axis: an operator under a strategy, one step of a conversion.

A conversion costs its collectives, and the copies that `codegen/runtime/collectives.py` makes around them:

    all_gather on dim d            the gathered shards are concatenated: reads and writes the whole
    reduce_scatter on dim d        the input is cut and stacked first: reads and writes the whole
                                   (neither where the dims before d have size one: the shards lie in order already)
    all_to_all                     one copy of the shard before, one after
    slice                          a copy of the slice;  pad, keep: writes the whole, reads what is kept
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from autopar.graph.ir import Node, OpGraph, TensorMeta
from autopar.job import Job
from autopar.sharding.conversions import COMMUNICATES, Step
from autopar.sharding.layout import SpmdType
from autopar.sharding.rules import Strategy
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.op_costs import LocalTensor, OpCosts

_WIDTHS = {
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


def element_bytes(dtype: str, job: Job) -> int:
    """Bytes per element of a tensor whose `TensorMeta.dtype` is ``dtype``."""
    if dtype == "compute":
        return job.compute_bytes
    if dtype == "float32":
        return max(4, job.compute_bytes)
    return _WIDTHS[dtype]


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds forward and backward; of these, ``communication_s`` in collectives (both directions)."""

    forward_s: float
    backward_s: float
    communication_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.forward_s + self.backward_s

    def __add__(self, other: Price) -> Price:
        return Price(
            self.forward_s + other.forward_s,
            self.backward_s + other.backward_s,
            self.communication_s + other.communication_s,
        )


FREE = Price(0.0, 0.0)


class AxisPrices:
    """Prices on a model axis of ``size`` ranks, ``stride`` apart, for ``batch`` samples a micro-batch."""

    def __init__(self, ops: OpCosts, collectives: CollectiveCosts, size: int, batch: int, stride: int = 1) -> None:
        self.ops = ops
        self.collectives = collectives
        self.size = size
        self.stride = stride
        self.batch = batch
        self.job = ops.job
        self._conversions: dict[object, Price] = {}
        self._wholes: dict[TensorMeta, LocalTensor] = {}

    def whole(self, meta: TensorMeta) -> LocalTensor:
        """The tensor in full."""
        found = self._wholes.get(meta)
        if found is None:
            shape = meta.at(self.batch, self.job.seq_len)
            found = self._wholes[meta] = LocalTensor(shape, element_bytes(meta.dtype, self.job))
        return found

    def local(self, meta: TensorMeta, kind: SpmdType) -> LocalTensor:
        """What one rank holds of a tensor of this type."""
        whole = self.whole(meta)
        if kind.kind != "S":
            return whole
        shape = list(whole.shape)
        shape[kind.dim] //= self.size
        return LocalTensor(tuple(shape), whole.bytes_per_element)

    def operator(self, node: Node, graph: OpGraph, strategy: Strategy | None) -> tuple[Price, str]:
        """An op node under a strategy (None: whole, on a single rank), and where the figure is from."""
        operands = [graph.nodes[name].meta for name in node.operands()]
        if strategy is None:
            inputs = [self.whole(meta) for meta in operands]
            output = self.whole(node.meta)
        else:
            inputs = [self.local(meta, kind) for meta, kind in zip(operands, strategy.inputs, strict=True)]
            output = self.local(node.meta, strategy.output)
        time = self.ops.seconds(node, inputs, output, [meta.requires_grad for meta in operands])
        price = Price(time.forward, time.backward)
        for inner in strategy.inner if strategy else ():
            whole = self.whole(TensorMeta(inner.shape, inner.dtype))
            seconds = self.collectives.seconds(inner.collective, whole.nbytes, self.size, self.stride)
            price += Price(0.0, seconds, seconds) if inner.backward else Price(seconds, 0.0, seconds)
        return price, time.source

    def conversion(self, meta: TensorMeta, step: Step) -> Price:
        """One direct conversion of a tensor."""
        whole = self.whole(meta)
        key = (whole, step)
        found = self._conversions.get(key)
        if found is None:
            forward, sent = self._action(step.forward, whole, step.source, step.target)
            backward, returned = self._action(step.backward, whole, step.target.gradient, step.source.gradient)
            found = self._conversions[key] = Price(forward, backward, sent + returned)
        return found

    def _action(self, action: str, tensor: LocalTensor, source: SpmdType, target: SpmdType) -> tuple[float, float]:
        """(seconds, those in the collective) of an action on a value or gradient that is ``tensor`` in full."""
        if action == "none":
            return 0.0, 0.0
        whole = tensor.nbytes
        part = whole / self.size
        copied = {
            "all_gather": 0 if _in_order(tensor, source) else 2 * whole,
            "reduce_scatter": 0 if _in_order(tensor, target) else 2 * whole,
            "all_to_all": 4 * part,
            "all_reduce": 0,
            "slice": 2 * part,
            "pad": whole + 2 * part,
            "keep": 2 * whole,
        }[action]
        local = self.ops.stream_seconds(copied, 2 if action == "all_to_all" else 1)
        if action not in COMMUNICATES:
            return local, 0.0
        sent = self.collectives.seconds(action, whole, self.size, self.stride)
        return local + sent, sent


def _in_order(tensor: LocalTensor, split: SpmdType) -> bool:
    """Whether the shards of a split, one after the other, are the tensor."""
    return split.blocks == 1 and prod(tensor.shape[: split.dim]) == 1
