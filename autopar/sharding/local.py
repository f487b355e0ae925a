"""Local shards: their shapes, the arguments an operator takes on them, cutting whole tensors and joining them again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autopar.errors import VerificationError
from autopar.graph.ir import Node
from autopar.graph.size import Size, size_at
from autopar.sharding.layout import Layout, SpmdType

Coordinate = dict[str, int]
"""A rank's index on every axis."""


def coordinates(axes: Mapping[str, int]) -> list[Coordinate]:
    """The coordinates of all ranks in rank order: the first axis is the outermost."""
    return [dict(zip(axes, index, strict=True)) for index in itertools.product(*map(range, axes.values()))]


def blocks_at(layout: Layout, axis: str, axes: Mapping[str, int], batch: int, seq: int) -> SpmdType:
    """The type of ``axis``, its blocks as an integer: those on a shard that the axes outside it have already cut.

    A layout counts the blocks of the whole dim; an outer axis that splits a more major factor has cut that count.
    Raises VerificationError when the two splits do not nest.
    """
    kind = layout[axis]
    if kind.kind != "S":
        return kind
    blocks, ranks = size_at(kind.blocks, batch, seq), 1
    for outer in itertools.takewhile(lambda name: name != axis, layout.splits(kind.dim)):
        if size_at(layout[outer].blocks, batch, seq) < blocks:
            ranks *= axes[outer]
    if blocks % ranks:
        raise VerificationError(f"layout {layout}: the {blocks} blocks {axis} splits are cut by axes outside it")
    return SpmdType("S", kind.dim, blocks // ranks)


def local_shape(shape: Sequence[int], layout: Layout, axes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one rank's shard of a tensor of ``shape`` (integers) on mesh axes of these sizes.

    Raises VerificationError for a dim that does not divide.
    """
    local = list(shape)
    for axis, kind in layout.types:
        if kind.kind == "S":
            if kind.dim >= len(local) or local[kind.dim] % axes[axis]:
                raise VerificationError(f"shape {tuple(shape)} does not divide as {layout} on {dict(axes)}")
            local[kind.dim] //= axes[axis]
    return tuple(local)


_WHOLE_SHAPE = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand", "aten.broadcast_to")
"""Operators that take their output's shape as second argument."""


def localize(
    node: Node, output: Layout, axes: Mapping[str, int], batch: int, seq: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an op node on local shards: sizes in integers, `Ref` left in place.

    ``output``: the layout its output is produced in. Only arguments that tell sizes of split dims change.
    """
    args = list(_numbers(node.args, batch, seq))
    kwargs = _numbers(node.kwargs, batch, seq)
    shape = local_shape(node.meta.at(batch, seq), output, axes)
    if node.op in _WHOLE_SHAPE:
        if len(args) > 1:
            args[1] = shape
        else:
            kwargs["size"] = shape
    elif node.op == "aten.unflatten":
        args[2] = shape[args[1] : args[1] + len(args[2])]
    elif node.op in ("aten.slice", "aten.narrow"):
        ranks = math.prod(axes[axis] for axis in output.splits(args[1]))
        args[2:4] = [None if value is None else value // ranks for value in args[2:4]]
    return tuple(args), kwargs


def _numbers(value: Any, batch: int, seq: int) -> Any:
    if isinstance(value, Size):
        return size_at(value, batch, seq)
    if isinstance(value, tuple | list):
        return tuple(_numbers(item, batch, seq) for item in value)
    if isinstance(value, dict):
        return {key: _numbers(item, batch, seq) for key, item in value.items()}
    return value


def _blocked(x: torch.Tensor, dim: int, blocks: int) -> torch.Tensor:
    return x.reshape(*x.shape[:dim], blocks, x.shape[dim] // blocks, *x.shape[dim + 1 :])


def cut(x: torch.Tensor, dim: int, blocks: int, ranks: int) -> list[torch.Tensor]:
    """``x`` cut into ``ranks`` equal shards on ``dim``, each a slice of every one of ``blocks`` blocks."""
    parts = _blocked(x, dim, blocks).chunk(ranks, dim + 1)
    if len(parts) != ranks or parts[0].shape != parts[-1].shape:
        raise VerificationError(f"dim {dim} of {tuple(x.shape)} in {blocks} blocks does not divide by {ranks}")
    return [part.flatten(dim, dim + 1).contiguous() for part in parts]


def join(shards: Sequence[torch.Tensor], dim: int, blocks: int) -> torch.Tensor:
    """The inverse of `cut`."""
    return torch.cat([_blocked(x, dim, blocks) for x in shards], dim + 1).flatten(dim, dim + 1)


def shard(
    whole: torch.Tensor,
    layout: Layout,
    axes: Mapping[str, int],
    batch: int = 1,
    seq: int = 1,
    generator: torch.Generator | None = None,
) -> list[torch.Tensor]:
    """What each rank holds of ``whole`` under ``layout``, in rank order. Summands of P are random (small integers)."""
    held: dict[tuple[tuple[str, int], ...], torch.Tensor] = {(): whole}
    for axis in (*(axis for axis, _ in layout.types), *(axis for axis in axes if axis not in dict(layout.types))):
        kind, ranks = blocks_at(layout, axis, axes, batch, seq), axes[axis]
        grown = {}
        for key, x in held.items():
            for index, part in enumerate(_parts(x, kind, ranks, generator)):
                grown[(*key, (axis, index))] = part
        held = grown
    by_rank = {tuple(sorted(key)): x for key, x in held.items()}
    return [by_rank[tuple(sorted(coordinate.items()))].clone() for coordinate in coordinates(axes)]


def _parts(x: torch.Tensor, kind: SpmdType, ranks: int, generator: torch.Generator | None) -> list[torch.Tensor]:
    if kind.kind == "S":
        return cut(x, kind.dim, _count(kind), ranks)
    if kind.kind == "P":
        noise = [torch.randint(-4, 5, x.shape, generator=generator).to(x.dtype) for _ in range(ranks - 1)]
        return [x - sum(noise), *noise]
    return [x] * ranks


def unshard(
    shards: Sequence[torch.Tensor], layout: Layout, axes: Mapping[str, int], batch: int = 1, seq: int = 1
) -> torch.Tensor:
    """The whole tensor from what the ranks hold (in rank order). Of equal copies the first rank's is taken."""
    held = {tuple(sorted(c.items())): x for c, x in zip(coordinates(axes), shards, strict=True)}
    inner_first = [axis for axis, _ in reversed(layout.types)]
    for axis in (*(axis for axis in axes if axis not in inner_first), *inner_first):
        kind = blocks_at(layout, axis, axes, batch, seq)
        groups: dict[tuple[tuple[str, int], ...], list[tuple[int, torch.Tensor]]] = {}
        for key, x in held.items():
            rest = tuple(pair for pair in key if pair[0] != axis)
            groups.setdefault(rest, []).append((dict(key)[axis], x))
        held = {key: _whole([x for _, x in sorted(g, key=lambda pair: pair[0])], kind) for key, g in groups.items()}
    return held[()]


def _whole(parts: list[torch.Tensor], kind: SpmdType) -> torch.Tensor:
    if kind.kind == "S":
        return join(parts, kind.dim, _count(kind))
    return torch.stack(parts).sum(0) if kind.kind == "P" else parts[0]


def _count(kind: SpmdType) -> int:
    return size_at(kind.blocks, 1, 1)


def required(types: Mapping[str, SpmdType]) -> Layout:
    """The layout that strategies ask of a tensor: one type per axis, in mesh order (outer axes split outside)."""
    return Layout(tuple(types.items()))


def produced_layouts(node: Node, choice: Mapping[str, Any]) -> tuple[tuple[Layout, ...], Layout]:
    """Layouts of the operands and of the output of ``node`` when axis a runs strategy ``choice[a]``."""
    inputs = tuple(
        required({axis: strategy.inputs[index] for axis, strategy in choice.items()})
        for index in range(len(node.operands()))
    )
    return inputs, required({axis: strategy.output for axis, strategy in choice.items()})
