"""Operators that are a few others, and are taken apart into them: what each is made of has rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from autopar.errors import UnsupportedError
from autopar.graph.cross_entropies import CROSS_ENTROPIES
from autopar.graph.distances import DISTANCES
from autopar.graph.draft import Draft
from autopar.graph.elementwise_losses import ELEMENTWISE_LOSSES
from autopar.graph.ir import Ref
from autopar.graph.pixels import PIXELS
from autopar.graph.recurrent_cells import CELLS
from autopar.graph.size import divide
from autopar.graph.windows import im2col, unfold


def glu(draft: Draft, x: Ref, dim: int = -1) -> Ref:
    """The first half along ``dim``, gated by the second."""
    shape = draft.shape(x)
    dim %= len(shape)
    half = divide(shape[dim], 2)
    if half is None:
        raise UnsupportedError(f"glu halves dim {dim} of size {shape[dim]}")
    halves = draft.unflatten(x, dim, (2, half), free=1)
    first, second = (draft.select(halves, dim, index) for index in range(2))
    gate = Ref(draft.emit("aten.sigmoid", second, shape=draft.shape(second)))
    return Ref(draft.emit("aten.mul", first, gate, shape=draft.shape(first)))


def bilinear(draft: Draft, x: Ref, y: Ref, weight: Ref, bias: Ref | None = None) -> Ref:
    """x [..., i], y [..., j], weight [o, i, j], bias [o] -> [..., o]: x's products with all matrices, times y."""
    *lead, _ = draft.shape(x)
    out, _, other = draft.shape(weight)
    rows = draft.flatten(draft.permute(weight, (0, 2, 1)), 0, 1)
    product = Ref(draft.emit("aten.linear", x, rows, shape=(*lead, *draft.shape(rows)[:1])))
    product = draft.unflatten(product, len(lead), (out, other), free=1)
    product = Ref(draft.emit("aten.mul", product, draft.unsqueeze(y, len(lead)), shape=(*lead, out, other)))
    total = Ref(draft.emit("aten.sum", product, (len(lead) + 1,), shape=(*lead, out)))
    return total if bias is None else Ref(draft.emit("aten.add", total, bias, shape=(*lead, out)))


def _of_scores(op: str) -> Callable[..., Ref]:
    """``op`` by the name that it has below autograd; ``wide``: in float32, whatever ``x`` is."""

    def formula(draft: Draft, x: Ref, dim: int, wide: bool = False) -> Ref:
        x, shape = draft.cast(x, "float32") if wide else x, draft.shape(x)
        return Ref(draft.emit(op, x, dim % max(len(shape), 1), shape=shape, dtype=draft.meta(x).dtype))

    return formula


def tile(draft: Draft, x: Ref, counts: Sequence[int]) -> Ref:
    """``x`` repeated along its last dims, or along all and new ones before them."""
    shape = draft.shape(x)
    counts = (1,) * (len(shape) - len(counts)) + tuple(counts)
    sizes = (1,) * (len(counts) - len(shape)) + shape
    tiled = tuple(size * count for size, count in zip(sizes, counts, strict=True))
    return Ref(draft.emit("aten.repeat", x, counts, shape=tiled, dtype=draft.meta(x).dtype))


def movedim(draft: Draft, x: Ref, source: int | Sequence[int], target: int | Sequence[int]) -> Ref:
    """Dims ``source`` at the places ``target``, the others in order."""
    rank = len(draft.shape(x))
    moved = [(each,) if isinstance(each, int) else tuple(each) for each in (source, target)]
    froms, places = ([dim % rank for dim in dims] for dims in moved)
    others = iter(dim for dim in range(rank) if dim not in froms)
    return draft.permute(x, [froms[places.index(place)] if place in places else next(others) for place in range(rank)])


def norm(draft: Draft, x: Ref, order: float | None = None, dims: Any = None, keep: bool = False) -> Ref:
    """The norm of vectors (torch has those of matrices in no half precision, in which models are traced)."""
    shape = draft.shape(x)
    along = tuple(range(len(shape))) if dims is None else tuple(dims) if isinstance(dims, tuple | list) else (dims,)
    along = tuple(dim % len(shape) for dim in along)
    left = tuple(1 if dim in along else size for dim, size in enumerate(shape) if keep or dim not in along)
    given = (2 if order is None else order, along, *((True,) if keep else ()))
    return Ref(draft.emit("aten.linalg_vector_norm", x, *given, shape=left, dtype=draft.meta(x).dtype))


def prelu(draft: Draft, x: Ref, weight: Ref) -> Ref:
    """x [b, c, ...], weight [c] or [1]: x where it is positive, else weight x."""
    shape = draft.shape(x)
    if draft.shape(weight) != (1,):
        for _ in shape[2:]:
            weight = draft.unsqueeze(weight, len(draft.shape(weight)))
    positive = Ref(draft.emit("aten.gt", x, 0, shape=shape, dtype="bool"))
    scaled = Ref(draft.emit("aten.mul", x, weight, shape=shape))
    return Ref(draft.emit("aten.where", positive, x, scaled, shape=shape, dtype=draft.meta(x).dtype))


def put(draft: Draft, x: Ref, index: Sequence[Ref | None], values: Ref, accumulate: bool = False) -> Ref:
    """``x[mask] = values``: one number or row for all that is marked, or rows in order. Other indices are left as they
    are."""
    shape, dtype = draft.shape(x), draft.meta(x).dtype
    masks = [each for each in index if each is not None]
    if len(index) != 1 or len(masks) != 1 or draft.meta(masks[0]).dtype != "bool" or accumulate:
        options = (True,) if accumulate else ()
        return Ref(draft.emit("aten.index_put", x, tuple(index), values, *options, shape=shape, dtype=dtype))
    mask = masks[0]
    given, rank = draft.shape(values), 1 + len(shape) - len(draft.shape(mask))
    for _ in range(len(shape) - len(draft.shape(mask))):
        mask = draft.unsqueeze(mask, len(draft.shape(mask)))
    if len(given) == rank and given[0] == 1:
        values, given = draft.squeeze(values, 0), given[1:]
    if len(given) < rank:
        return Ref(draft.emit("aten.where", mask, values, x, shape=shape, dtype=dtype))
    return Ref(draft.emit("aten.masked_scatter", x, draft.expand(mask, shape), values, shape=shape, dtype=dtype))


FORMULAS: dict[str, Callable[..., Any]] = {
    "_softmax": _of_scores("aten.softmax"),
    "_log_softmax": _of_scores("aten.log_softmax"),
    "bilinear": bilinear,
    "glu": glu,
    "im2col": im2col,
    "index_put": put,
    "linalg_norm": norm,
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    "prelu": prelu,
    "tile": tile,
    "unfold": unfold,
    **CROSS_ENTROPIES,
    **DISTANCES,
    **ELEMENTWISE_LOSSES,
    **PIXELS,
    **CELLS,
}
