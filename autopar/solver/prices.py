"""Seconds of what a block does on its model axes: an operator under strategies, one step of a conversion.

A collective on one axis moves the tensor that is whole on that axis and local on the others; the ranks of an axis are
as far apart as the axes inside it have ranks: those of the block, unless the order of the mesh has others there.

A conversion costs its collectives, and the copies that `codegen/runtime/collectives.py` makes around them:

    all_gather on dim d            the gathered shards are concatenated: reads and writes the whole
    reduce_scatter on dim d        the input is cut and stacked first: reads and writes the whole
                                   (neither where the dims before d have size one: the shards lie in order already)
    all_to_all                     one copy of the shard before, one after
    slice                          a copy of the slice;  pad, keep: writes the whole, reads what is kept

Stacks that cut gathers and scatters of tensor parallelism into as many parts as there are ranks, and the matmuls beside
them as well (`Stack.chunked`), wait for one part of them: the first of what is needed, the last of what is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import NamedTuple

from autopar.graph.ir import EXPERTS, Node, OpGraph, TensorMeta
from autopar.graph.size import Size
from autopar.job import Job
from autopar.mesh import strides
from autopar.sharding.conversions import COMMUNICATES, Step
from autopar.sharding.factors import RING, Inner
from autopar.sharding.layout import CONTEXT, Layout, SpmdType
from autopar.sharding.local import produced_layouts
from autopar.sharding.rules import Strategy
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.expert_work import exchanged_rows
from autopar.solver.op_costs import LocalTensor, OpCosts
from autopar.solver.ring_work import ring_time
from autopar.stack import Stack

_WIDTHS = {
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "complex64": 8,
    "complex128": 16,
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
    """Seconds forward and backward on the device; of these, ``communication_s`` in collectives (both directions;
    ``sent_forward_s``: forward alone). ``host_forward_s``, ``host_backward_s``: seconds that the host takes to start
    what runs."""

    forward_s: float
    backward_s: float
    communication_s: float = 0.0
    host_forward_s: float = 0.0
    host_backward_s: float = 0.0
    sent_forward_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.forward_s + self.backward_s

    @property
    def computing_s(self) -> float:
        """Those that are not in collectives."""
        return self.seconds - self.communication_s

    @property
    def computing_forward_s(self) -> float:
        return self.forward_s - self.sent_forward_s

    def __add__(self, other: Price) -> Price:
        return Price(
            self.forward_s + other.forward_s,
            self.backward_s + other.backward_s,
            self.communication_s + other.communication_s,
            self.host_forward_s + other.host_forward_s,
            self.host_backward_s + other.host_backward_s,
            self.sent_forward_s + other.sent_forward_s,
        )


FREE = Price(0.0, 0.0)


class Part(NamedTuple):
    """What ranks hold of a tensor of ``shape``, whatever the sizes of the axes: ``splits`` names (dim, axis)."""

    shape: tuple[int | Size, ...]
    dtype: str
    splits: tuple[tuple[int, str], ...]

    @staticmethod
    def of(meta: TensorMeta, types: Iterable[tuple[str, SpmdType]]) -> Part:
        """The part of a tensor of these types, one for each axis that may split it."""
        dims = len(meta.shape)
        splits = [(kind.dim, axis) for axis, kind in types if kind.kind == "S" and kind.dim < dims]
        return Part(meta.shape, meta.dtype, tuple(splits))


class Inside(NamedTuple):
    """A collective inside an operator, on ``axis``, of a tensor of which the ranks of that axis hold ``part``."""

    collective: str
    part: Part
    axis: str
    backward: bool

    @staticmethod
    def of(inner: Inner, axis: str, layout: Layout) -> Inside:
        """``inner`` of a strategy on ``axis``; the other axes split its tensor as ``layout`` says."""
        others = [(other, kind) for other, kind in layout.types if other != axis]
        part = Part.of(TensorMeta(inner.shape, inner.dtype), others)
        return Inside(inner.collective, part, axis, inner.backward)


class Action(NamedTuple):
    """What a conversion does on ``axis`` forward, or backward. The shards of a gather or scatter are in order in memory
    where all dims before ``dim`` have one element (`LocalTensor.outer`)."""

    name: str
    axis: str
    dim: int

    @staticmethod
    def of(axis: str, step: Step) -> tuple[Action, Action]:
        """The actions of a step, forward and backward."""
        back = step.target.gradient, step.source.gradient
        return _action(step.forward, axis, step.source, step.target), _action(step.backward, axis, *back)


_NEVER = 1 << 30
"""A dim that has more before it than any tensor."""


@lru_cache(maxsize=4096)
def _action(name: str, axis: str, source: SpmdType, target: SpmdType) -> Action:
    if name not in ("all_gather", "reduce_scatter"):
        return Action(name, axis, 0)
    split = source if name == "all_gather" else target
    return Action(name, axis, split.dim if split.blocks == 1 else _NEVER)


class AxisPrices:
    """Prices on model axes (name to size), for ``batch`` samples a micro-batch. ``apart``: how many ranks apart
    neighbours on each axis are (`Mesh.strides`); by default the axes are innermost, the first outside the others."""

    def __init__(
        self,
        ops: OpCosts,
        collectives: CollectiveCosts,
        axes: Mapping[str, int],
        batch: int,
        apart: Mapping[str, int] | None = None,
    ) -> None:
        self.ops = ops
        self.collectives = collectives
        self.axes = dict(axes)
        self.strides = strides(axes) if apart is None else {axis: apart[axis] for axis in axes}
        self.batch = batch
        self.job = ops.job
        self._actions: dict[tuple[str, int, str, bool], tuple[float, float]] = {}
        self._wholes: dict[TensorMeta, LocalTensor] = {}

    @property
    def ranks(self) -> int:
        """Ranks that hold a block together."""
        return prod(self.axes.values())

    def whole(self, meta: TensorMeta) -> LocalTensor:
        """The tensor in full."""
        found = self._wholes.get(meta)
        if found is None:
            shape = meta.at(self.batch, self.job.seq_len)
            found = self._wholes[meta] = LocalTensor(shape, element_bytes(meta.dtype, self.job))
        return found

    def local(self, meta: TensorMeta, layout: Layout) -> LocalTensor:
        """What the first rank, whose part is the largest, holds of a tensor in this layout."""
        return self._split(self.whole(meta), layout.types)

    def held(self, part: Part) -> LocalTensor:
        """What the first rank holds of a part."""
        seq = self.job.seq_len
        shape = [size if isinstance(size, int) else size.at(self.batch, seq) for size in part.shape]
        for dim, axis in part.splits:
            shape[dim] = ceil(shape[dim] / self.axes[axis])
        return LocalTensor(tuple(shape), element_bytes(part.dtype, self.job))

    def _split(self, whole: LocalTensor, types: Iterable[tuple[str, SpmdType]]) -> LocalTensor:
        shape = list(whole.shape)
        for axis, kind in types:
            if kind.kind == "S" and kind.dim < len(shape):
                shape[kind.dim] = ceil(shape[kind.dim] / self.axes[axis])
        return LocalTensor(tuple(shape), whole.bytes_per_element)

    def operator(self, node: Node, graph: OpGraph, choice: Mapping[str, Strategy]) -> tuple[Price, str]:
        """An op node under a strategy on each axis (none: whole, on a single rank), and where the figure is from."""
        operands = [graph.nodes[name].meta for name in node.operands()]
        layouts, made = produced_layouts(node, choice)
        inputs = [self.local(meta, layout) for meta, layout in zip(operands, layouts, strict=True)]
        inside = [
            (each, self.held(each.part))
            for axis, strategy in choice.items()
            for each in (Inside.of(inner, axis, layouts[inner.like]) for inner in strategy.inner)
        ]
        return self.timed(node, inputs, self.local(node.meta, made), [m.requires_grad for m in operands], inside)

    def timed(
        self,
        node: Node,
        inputs: Sequence[LocalTensor],
        output: LocalTensor,
        grads: Sequence[bool],
        inside: Iterable[tuple[Inside, LocalTensor]],
    ) -> tuple[Price, str]:
        """An op node on local tensors with the collectives ``inside`` it on what they move, and where the figure is
        from. ``grads``: which inputs want a gradient."""
        inside = list(inside)
        for each, moved in inside:
            if each.collective == RING:
                return self._ring(node, inputs, output, grads, each.axis, moved.nbytes)
        time = self.ops.seconds(node, inputs, output, grads)
        price = Price(time.forward, time.backward, 0.0, time.host_forward, time.host_backward)
        if node.op == EXPERTS:
            tensor_ranks = prod(size for axis, size in self.axes.items() if axis != CONTEXT)
            sent = exchange_seconds(node, inputs, self.collectives, tensor_ranks)
            forward, backward = (exposed(sent, beside, self.ops.stack) for beside in (time.forward, time.backward))
            price += Price(forward, backward, forward + backward, sent_forward_s=forward)
        for each, moved in inside:
            seconds = self.collective(each.collective, moved.nbytes, each.axis)
            ahead, back = (0.0, seconds) if each.backward else (seconds, 0.0)
            price += Price(ahead, back, seconds, sent_forward_s=ahead)
        return price, time.source

    def _ring(
        self,
        node: Node,
        inputs: Sequence[LocalTensor],
        output: LocalTensor,
        grads: Sequence[bool],
        axis: str,
        nbytes: int,
    ) -> tuple[Price, str]:
        """Attention whose keys and values, ``nbytes`` of all ranks of ``axis``, go round."""
        ranks = self.axes[axis]
        sent = self.collective("send_recv", nbytes / ranks, axis)
        time = ring_time(self.ops, node, inputs, output, grads, ranks, sent)
        forward, backward = time.forward + time.waits_forward, time.backward + time.waits_backward
        waits = time.waits_forward + time.waits_backward
        price = Price(forward, backward, waits, time.host_forward, time.host_backward, time.waits_forward)
        return price, time.source

    def collective(self, kind: str, nbytes: float, axis: str) -> float:
        """Seconds of a collective on one axis; ``nbytes``: of the tensor that is whole there."""
        return self.collectives.seconds(kind, nbytes, self.axes[axis], self.strides[axis])

    def conversion(self, meta: TensorMeta, layout: Layout, axis: str, step: Step) -> Price:
        """One direct conversion on ``axis`` of a tensor held in ``layout``."""
        return self.moved(self.across(meta, layout, axis), axis, step)

    def across(self, meta: TensorMeta, layout: Layout, axis: str) -> LocalTensor:
        """What the ranks of ``axis`` hold together of a tensor in this layout."""
        return self._split(self.whole(meta), [(other, kind) for other, kind in layout.types if other != axis])

    def moved(self, tensor: LocalTensor, axis: str, step: Step) -> Price:
        """One direct conversion on ``axis`` of what is ``tensor`` when it is whole there."""
        ahead, back = Action.of(axis, step)
        forward, sent = self.acted(tensor, ahead)
        backward, returned = self.acted(tensor, back)
        return Price(forward, backward, sent + returned, sent_forward_s=sent)

    def acted(self, tensor: LocalTensor, action: Action) -> tuple[float, float]:
        """(seconds, those in the collective) of an action on a value or gradient that is ``tensor`` in full."""
        if action.name == "none":
            return 0.0, 0.0
        key = (action.name, tensor.nbytes, action.axis, action.dim <= tensor.outer)
        found = self._actions.get(key)
        if found is None:
            found = self._actions[key] = self._act(*key)
        return found

    def _act(self, action: str, whole: int, axis: str, ordered: bool) -> tuple[float, float]:
        part = whole / self.axes[axis]
        copied = {
            "all_gather": 0 if ordered else 2 * whole,
            "reduce_scatter": 0 if ordered else 2 * whole,
            "all_to_all": 4 * part,
            "all_reduce": 0,
            "slice": 2 * part,
            "pad": whole + 2 * part,
            "keep": 2 * whole,
        }[action]
        local = self.ops.stream_seconds(copied, 2 if action == "all_to_all" else 1)
        if action not in COMMUNICATES:
            return local, 0.0
        sent = self.collective(action, whole, axis)
        if self.ops.stack.chunked and axis != CONTEXT and action in ("all_gather", "reduce_scatter"):
            sent /= self.axes[axis]
        return local + sent, sent


def exchange_seconds(
    node: Node, inputs: Sequence[LocalTensor], collectives: CollectiveCosts, tensor_ranks: int
) -> float:
    """What experts that ``ep`` data ranks share take to send tokens there and back, either way: the rows and their
    weights, as many as the fullest rank gets (`Stack.imbalance`), the rows that come back, and before them how many
    there are. Data ranks are ``tensor_ranks`` apart."""
    ep = int(node.kwargs.get("ep", 1))
    if ep == 1:
        return 0.0
    hidden, index, weights, up = inputs[:4]
    rows = exchanged_rows(node, index, up) * collectives.stack.imbalance
    width, counts = hidden.shape[-1] * hidden.bytes_per_element, up.shape[0] * 4
    choices = index.shape[-1] if collectives.stack.once else 0
    moved = (rows * width, rows * weights.bytes_per_element, rows * width, ep * counts)
    return sum(collectives.exchange(nbytes, ep, tensor_ranks, choices) for nbytes in moved)


def exposed(sent: float, beside: float, stack: Stack) -> float:
    """Of the seconds of an exchange those that a stack does not hide behind the experts of another micro-batch."""
    return max(0.0, sent - beside) if stack.hidden else sent
