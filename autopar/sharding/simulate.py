"""Worlds: who holds what, and how values cross ranks, when sharded code runs without process groups.

A value is the list of what the world's ranks hold. `SimulatedWorld` has all ranks of a mesh in one process, with
differentiable collectives: every conversion has the forward and the backward of its table entry, so that gradients
have the types the algebra claims. `LocalWorld` is one rank, whose conversions the caller supplies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from autopar.sharding.conversions import Step
from autopar.sharding.layout import SpmdType
from autopar.sharding.local import Coordinate, coordinates, cut, join

Values = list[torch.Tensor]


class World(Protocol):
    """The ranks a run has in hand (`ranks`: their coordinates), and what it may ask across an axis."""

    axes: Mapping[str, int]
    ranks: list[Coordinate]

    def convert(self, values: Values, step: Step, axis: str) -> Values:
        """Each rank's value after ``step`` on ``axis``. Blocks in the types are integers, of the local shard."""

    def all_reduce(self, values: Values, axis: str, op: str) -> Values:
        """The "sum" or "max" over ``axis``, the same on each rank (type I: the backward of a sum does nothing)."""

    def shift(self, values: Values, axis: str) -> Values:
        """Each rank's value is that of the rank before it on ``axis``; the first has the last one's."""


def act(action: str, values: Values, source: SpmdType, target: SpmdType) -> Values:
    """One action of the conversion table on what the ranks of one group hold, in rank order."""
    ranks = len(values)
    if action == "none":
        return list(values)
    if action == "all_gather":
        return [join(values, source.dim, _count(source))] * ranks
    if action in ("all_reduce", "reduce_scatter"):
        total = torch.stack(values).sum(0)
        return [total] * ranks if action == "all_reduce" else cut(total, target.dim, _count(target), ranks)
    if action == "slice":
        return [cut(x, target.dim, _count(target), ranks)[rank] for rank, x in enumerate(values)]
    if action == "pad":
        zeros = torch.zeros_like(values[0])
        return [
            join([x if other == rank else zeros for other in range(ranks)], source.dim, _count(source))
            for rank, x in enumerate(values)
        ]
    if action == "keep":
        return [values[0], *(torch.zeros_like(x) for x in values[1:])]
    if action == "all_to_all":
        pieces = [cut(x, target.dim, _count(target), ranks) for x in values]
        return [join([piece[rank] for piece in pieces], source.dim, _count(source)) for rank in range(ranks)]
    raise ValueError(f"unknown action {action!r}")


def _count(kind: SpmdType) -> int:
    assert isinstance(kind.blocks, int)
    return kind.blocks


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.step = step
        return tuple(x.clone() for x in act(step.forward, list(values), step.source, step.target))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        step = ctx.step
        return (None, *act(step.backward, list(grads), step.target.gradient, step.source.gradient))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = torch.stack(values).sum(0)
        return tuple(total.clone() for _ in values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grads


class SimulatedWorld:
    """All ranks of a mesh with these axes, in one process."""

    def __init__(self, axes: Mapping[str, int]) -> None:
        self.axes = axes
        self.ranks = coordinates(axes)

    def _grouped(self, values: Values, axis: str, run: Callable[[Values], Sequence[torch.Tensor]]) -> Values:
        groups: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for index, coordinate in enumerate(self.ranks):
            groups.setdefault(tuple((a, c) for a, c in coordinate.items() if a != axis), []).append(index)
        done: dict[int, torch.Tensor] = {}
        for members in groups.values():
            done.update(zip(members, run([values[index] for index in members]), strict=True))
        return [done[index] for index in range(len(values))]

    def convert(self, values: Values, step: Step, axis: str) -> Values:
        return self._grouped(values, axis, lambda group: _Convert.apply(step, *group))  # type: ignore[no-untyped-call]

    def all_reduce(self, values: Values, axis: str, op: str) -> Values:
        if op == "max":
            return self._grouped(values, axis, lambda g: [torch.stack(g).amax(0).detach()] * len(g))
        return self._grouped(values, axis, lambda group: _Sum.apply(*group))  # type: ignore[no-untyped-call]

    def shift(self, values: Values, axis: str) -> Values:
        return self._grouped(values, axis, lambda group: [group[-1], *group[:-1]])


class LocalWorld:
    """One rank at ``coordinate``; by default its conversions have the right shapes and meaningless values.

    That is enough to read what is saved for backward under `FakeTensorMode`: as in the emitted code, a conversion
    saves nothing. ``convert(x, step, axis)`` and ``all_reduce(x, axis, op)`` may be given instead.
    """

    def __init__(
        self,
        axes: Mapping[str, int],
        coordinate: Coordinate | None = None,
        convert: Callable[[torch.Tensor, Step, str], torch.Tensor] | None = None,
        all_reduce: Callable[[torch.Tensor, str, str], torch.Tensor] | None = None,
    ) -> None:
        self.axes = axes
        self.ranks = [coordinate or dict.fromkeys(axes, 0)]
        self._convert = convert
        self._all_reduce = all_reduce

    def convert(self, values: Values, step: Step, axis: str) -> Values:
        if self._convert is not None:
            return [self._convert(x, step, axis) for x in values]
        return [_Resize.apply(x, step, self.axes[axis]) for x in values]  # type: ignore[no-untyped-call]

    def all_reduce(self, values: Values, axis: str, op: str) -> Values:
        if self._all_reduce is not None:
            return [self._all_reduce(x, axis, op) for x in values]
        return [x.detach() if op == "max" else _Resize.apply(x, None, 1) for x in values]  # type: ignore[no-untyped-call]

    def shift(self, values: Values, axis: str) -> Values:
        return [_Resize.apply(x, None, 1) for x in values]  # type: ignore[no-untyped-call]


def _resized(x: torch.Tensor, source: SpmdType, target: SpmdType, ranks: int) -> torch.Tensor:
    shape = list(x.shape)
    if source.kind == "S":
        shape[source.dim] *= ranks
    if target.kind == "S":
        shape[target.dim] //= ranks
    return x.new_zeros(shape)


class _Resize(torch.autograd.Function):
    """A conversion's shapes without its data; ``step`` None: the shape stays."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, step: Step | None, ranks: int) -> torch.Tensor:
        ctx.step, ctx.ranks = step, ranks
        if step is None:
            return torch.zeros_like(x)
        if step.forward == "none":
            return x.view_as(x)
        return _resized(x, step.source, step.target, ranks)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        step = ctx.step
        if step is None or step.backward == "none":
            return grad, None, None
        return _resized(grad, step.target, step.source, ctx.ranks), None, None
