"""Windows over a dim, which may overlap: a look-up of positions, and the dim of windows taken apart."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.errors import UnsupportedError
from autopar.graph.draft import Draft
from autopar.graph.ir import Ref
from autopar.graph.size import Size, divide


def windows(draft: Draft, x: Ref, dim: int, width: int, step: int, spread: int = 1) -> Ref:
    """Dim ``dim`` as two: windows, each ``step`` after the one before it, and the ``width`` positions in each, which
    are ``spread`` apart."""
    size = draft.shape(x)[dim]
    count = _count(size, width, step, spread)
    if step == width and spread == 1 and isinstance(count, int):
        return draft.unflatten(draft.slice(x, dim, 0, count * width), dim, (count, width))
    places = _table(draft, count, step)
    inside = _table(draft, width, spread)
    both = draft.emit(
        "aten.add", draft.unsqueeze(places, 1), draft.unsqueeze(inside, 0), shape=(count, width), dtype="int64"
    )
    index = draft.flatten(Ref(both), 0, 1)
    shape = draft.shape(x)
    looked_up = (*shape[:dim], *draft.shape(index), *shape[dim + 1 :])
    picked = Ref(draft.emit("aten.index_select", x, dim, index, shape=looked_up, dtype=draft.meta(x).dtype))
    return draft.unflatten(picked, dim, (count, width))


def _count(size: int | Size, width: int, step: int, spread: int) -> int | Size:
    over = size - (spread * (width - 1) + 1)
    if isinstance(over, int):
        return over // step + 1
    steps = divide(over, step)
    if steps is None:
        raise UnsupportedError(
            f"windows of {width} every {step} positions over a dim of size {size}: they do not divide"
        )
    return steps + 1


def _table(draft: Draft, count: int | Size, step: int) -> Ref:
    """0, step, 2 step, ..."""
    table = Ref(draft.emit("aten.arange", count, shape=(count,), dtype="int64"))
    return table if step == 1 else Ref(draft.emit("aten.mul", table, step, shape=(count,), dtype="int64"))


def unfold(draft: Draft, x: Ref, dim: int, width: int, step: int) -> Ref:
    """``x.unfold``: the windows in place of the dim, what is in each last."""
    shape = draft.shape(x)
    dim %= len(shape)
    found = windows(draft, x, dim, width, step)
    order = (*range(dim + 1), *range(dim + 2, len(shape) + 1), dim + 1)
    return draft.permute(found, order)


def im2col(
    draft: Draft,
    x: Ref,
    kernel: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    stride: Sequence[int] = (1, 1),
) -> Ref:
    """``F.unfold``: [b, c, h, w] -> [b, (c kernel), windows]."""
    *lead, height, width = draft.shape(x)
    if any(padding):
        shape = (*lead, height + 2 * padding[0], width + 2 * padding[1])
        pads = (padding[1], padding[1], padding[0], padding[0])
        x = Ref(draft.emit("aten.pad", x, pads, shape=shape, dtype=draft.meta(x).dtype))
    rank = len(lead)
    x = windows(draft, x, rank, kernel[0], stride[0], dilation[0])
    x = windows(draft, x, rank + 2, kernel[1], stride[1], dilation[1])
    x = draft.permute(x, (*range(rank), rank + 1, rank + 3, rank, rank + 2))
    return draft.flatten(draft.flatten(x, rank + 2, rank + 3), rank - 1, rank + 1)
