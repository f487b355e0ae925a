"""Local shards: their shapes, the arguments an operator takes on them, cutting whole tensors and joining them again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from autopar.errors import VerificationError
from autopar.graph.ir import CONVOLUTIONS, Node
from autopar.graph.size import Size, size_at
from autopar.sharding.layout import CONTEXT, Layout, SpmdType

if TYPE_CHECKING:
    from autopar.sharding.rules import Strategy

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
    """The shape of the first rank's shard, the largest, of a tensor of ``shape`` (integers) on axes of these sizes.

    Raises VerificationError for a dim that leaves a rank with nothing.
    """
    local = list(shape)
    for axis, kind in layout.types:
        if kind.kind == "S":
            if kind.dim >= len(local) or least_part(local[kind.dim], (axes[axis],)) < 1:
                raise VerificationError(f"shape {tuple(shape)} does not divide as {layout} on {dict(axes)}")
            local[kind.dim] = math.ceil(local[kind.dim] / axes[axis])
    return tuple(local)


def part_of(size: int, ways: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(start, length) of a rank's part of ``size`` elements. ``ways``: per axis, outermost first, the number of ranks
    and this rank's index. Chunks of the size rounded up, fewer elements for the last ranks, as `torch.chunk` cuts."""
    start, length = 0, size
    for ranks, index in ways:
        chunk = -(-length // ranks)
        first = min(index * chunk, length)
        start, length = start + first, min(chunk, length - first)
    return start, length


def least_part(size: int, sizes: Iterable[int]) -> int:
    """The fewest elements of ``size`` that any rank holds on axes of ``sizes``."""
    held = {size}  # which need not be the last rank's: 9 over 2 x 4 is 2 2 1 0, 1 1 1 1
    for ranks in sizes:
        held = {part_of(length, ((ranks, index),))[1] for length in held for index in range(ranks)}
    return min(held)


_WHOLE_SHAPE = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand", "aten.broadcast_to")
"""Operators that take their output's shape as second argument."""


GROUPS = 6
"""Which argument of a convolution is the number of its groups."""


def _rank(op: str) -> int:
    """Of a convolution, how many dims hold positions."""
    return int(op[-2])


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
    elif node.op in CONVOLUTIONS and len(args) > GROUPS and args[GROUPS] > 1:
        # Only groups split the channels of a convolution that has several.
        args[GROUPS] //= math.prod(axes[axis] for axis in output.splits(len(shape) - _rank(node.op) - 1))
    return tuple(args), kwargs


def _numbers(value: Any, batch: int, seq: int) -> Any:
    if isinstance(value, Size):
        return size_at(value, batch, seq)
    if isinstance(value, tuple | list):
        return tuple(_numbers(item, batch, seq) for item in value)
    if isinstance(value, dict):
        return {key: _numbers(item, batch, seq) for key, item in value.items()}
    return value


def _in_blocks(x: torch.Tensor, dim: int, blocks: int) -> torch.Tensor:
    return x.reshape(*x.shape[:dim], blocks, x.shape[dim] // blocks, *x.shape[dim + 1 :])


def cut(x: torch.Tensor, dim: int, blocks: int, ranks: int) -> list[torch.Tensor]:
    """``x`` cut into ``ranks`` equal shards on ``dim``, each a slice of every one of ``blocks`` blocks."""
    parts = _in_blocks(x, dim, blocks).chunk(ranks, dim + 1)
    if len(parts) != ranks or parts[0].shape != parts[-1].shape:
        raise VerificationError(f"dim {dim} of {tuple(x.shape)} in {blocks} blocks does not divide by {ranks}")
    return [part.flatten(dim, dim + 1).contiguous() for part in parts]


def join(shards: Sequence[torch.Tensor], dim: int, blocks: int) -> torch.Tensor:
    """The inverse of `cut`."""
    return torch.cat([_in_blocks(x, dim, blocks) for x in shards], dim + 1).flatten(dim, dim + 1)


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
    if kind.kind == "S" and kind.blocks == 1 and x.shape[kind.dim] % ranks:
        parts = list(x.chunk(ranks, kind.dim))
        if len(parts) != ranks:
            raise VerificationError(f"dim {kind.dim} of {tuple(x.shape)} leaves some of {ranks} ranks with nothing")
        return parts
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


def split_order(choice: Mapping[str, Strategy]) -> tuple[str, ...]:
    """The axes in the order in which they split a dim, outermost first: the mesh's order, in which the context axis
    is first, where that axis splits the sequence; elsewhere it comes last, and takes its part of what others leave."""
    context = choice.get(CONTEXT)
    if context is None or context.by_sequence:
        return tuple(choice)
    return (*(axis for axis in choice if axis != CONTEXT), CONTEXT)


def standard(types: Mapping[str, SpmdType], shape: Sequence[int | Size]) -> Layout:
    """One type per axis of a tensor of ``shape``, listed in the order of splits that `split_order` gives a tensor."""
    kind = types.get(CONTEXT)
    if kind is None or kind.kind != "S" or depends_on_sequence(shape[kind.dim]):
        return Layout(tuple(types.items()))
    return Layout((*[pair for pair in types.items() if pair[0] != CONTEXT], (CONTEXT, kind)))


def depends_on_sequence(size: int | Size) -> bool:
    """Whether a dim of ``size`` holds positions."""
    return isinstance(size, Size) and any(s > 0 for (_, s), _ in size.terms)


def produced_layouts(node: Node, choice: Mapping[str, Strategy]) -> tuple[tuple[Layout, ...], Layout]:
    """Layouts of the operands and of the output of ``node`` when axis a runs strategy ``choice[a]``."""
    order = [(axis, choice[axis]) for axis in split_order(choice)]
    count = len(order[0][1].inputs) if order else len(node.operands())
    inputs = tuple(
        Layout(tuple([(axis, strategy.inputs[index]) for axis, strategy in order])) for index in range(count)
    )
    return inputs, Layout(tuple((axis, strategy.output) for axis, strategy in order))


def settled(choice: Mapping[str, Strategy], axes: Mapping[str, int]) -> dict[str, Strategy]:
    """The same strategies, their splits written with as few blocks as axes of these sizes allow.

    Where outer axes have taken every block of a dim apart, an inner axis that splits within blocks splits what is left
    as a whole: 8 heads in 2 groups, split by group on 2 ranks and by head within the group on 4, are split by head.
    """
    if len(choice) < 2 or not any(_blocked(strategy) for strategy in choice.values()):
        return dict(choice)
    order = split_order(choice)
    found = dict(choice)
    for place, axis in enumerate(order):
        outer = [(choice[name], axes[name]) for name in order[:place]]
        if outer and _blocked(choice[axis]):
            inputs = tuple(
                _whole_block(kind, [(strategy.inputs[index], ranks) for strategy, ranks in outer])
                for index, kind in enumerate(choice[axis].inputs)
            )
            output = _whole_block(choice[axis].output, [(strategy.output, ranks) for strategy, ranks in outer])
            found[axis] = replace(choice[axis], inputs=inputs, output=output)
    return found


def _blocked(strategy: Strategy) -> bool:
    return any(kind.kind == "S" and kind.blocks != 1 for kind in (*strategy.inputs, strategy.output))


def _whole_block(kind: SpmdType, outer: Iterable[tuple[SpmdType, int]]) -> SpmdType:
    if kind.kind != "S" or not isinstance(kind.blocks, int):
        return kind
    around = [(other, ranks) for other, ranks in outer if other.kind == "S" and other.dim == kind.dim]
    ways = math.prod(ranks for other, ranks in around if isinstance(other.blocks, int) and other.blocks < kind.blocks)
    return SpmdType("S", kind.dim) if ways == kind.blocks else kind
