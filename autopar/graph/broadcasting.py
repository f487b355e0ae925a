"""Expanded tensors move down to where their full size is needed, and go where the reader broadcasts by itself.

Models expand masks, positions and token types to the batch size early. Left there, a constant would carry a batch dim
(and could not be shared by ranks that hold parts of the batch), and masks would be stored once per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autopar.graph.draft import Draft, Rule
from autopar.graph.ir import Node, Ref
from autopar.graph.size import Size

UNARY = "neg abs relu gelu silu sigmoid tanh exp log sqrt rsqrt logical_not bitwise_not clamp clamp_min clamp_max"
BROADCASTING = """
add sub mul div pow maximum minimum eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or
bitwise_xor where masked_fill
"""

Shape = tuple[int | Size, ...]


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape that tensors of ``shapes`` broadcast to."""
    result: list[int | Size] = []
    for shape in shapes:
        result = [*([1] * (len(shape) - len(result))), *result]
        for back in range(1, len(shape) + 1):
            result[-back] = shape[-back] if result[-back] == 1 else result[-back]
    return tuple(result)


def _thin(value: Any, new: Draft) -> Any:
    """What ``value`` expands, or ``value``."""
    wide = new.producer(value, "aten.expand")
    return wide.args[0] if wide else value


def elementwise(node: Node, new: Draft) -> Ref | None:
    """Operands are taken before their expansion; the result is expanded if nothing else makes it that size."""
    thin = tuple(_thin(value, new) for value in node.args)
    if thin == node.args or node.kwargs.get("out") is not None:
        return None
    shape = broadcast([new.shape(value) for value in thin if isinstance(value, Ref)])
    result = Ref(new.emit(node.op, *thin, shape=shape, dtype=node.meta.dtype, options=node.kwargs))
    return _expanded(result, node, new)


def embedding(node: Node, new: Draft) -> Ref | None:
    """Rows are looked up before the ids are expanded."""
    weight, ids, *rest = node.args
    thin = _thin(ids, new)
    if thin == ids:
        return None
    result = new.emit(node.op, weight, thin, *rest, shape=(*new.shape(thin), node.meta.shape[-1]), options=node.kwargs)
    return _expanded(Ref(result), node, new)


def _expanded(result: Ref, node: Node, new: Draft) -> Ref:
    if new.shape(result) == node.meta.shape:
        return result
    return new.expand(result, node.meta.shape)


def mask(node: Node, new: Draft) -> Ref | None:
    """Attention broadcasts its mask by itself."""
    wide = node.kwargs.get("attn_mask")
    thin = _thin(wide, new)
    if thin == wide or len(new.shape(thin)) < 2:
        return None
    options = {**node.kwargs, "attn_mask": thin}
    return Ref(new.emit(node.op, *node.args, shape=node.meta.shape, options=options))


def index(node: Node, new: Draft) -> Ref | None:
    """``x[i, j]`` with positions ``i`` and ``j`` that count whole dims, broadcast together, only adds dims of size one.

    Masks are written so, to be evaluated at any (sample, head, query, key): ``mask[sample, key]``. Rows of ``x[i]`` are
    looked up before ``i`` is expanded.
    """
    x, indices = node.args
    if len(indices) == 2 and all(isinstance(entry, Ref) for entry in indices):
        picked = _picked(x, indices[0], indices[1], node, new)
        if picked is not None:
            return picked
    if len(indices) == 1 and (thin := _thin(indices[0], new)) != indices[0] and new.meta(thin).dtype != "bool":
        shape = (*new.shape(thin), *new.shape(x)[1:])
        return _expanded(Ref(new.emit(node.op, x, (thin,), shape=shape)), node, new)
    if not all(isinstance(entry, Ref) for entry in indices) or len(indices) != len(new.shape(x)):
        return None
    rank = len(node.meta.shape)
    places: list[int] = []
    for dim, entry in enumerate(indices):
        place = _counts(entry, new.shape(x)[dim], rank, new)
        if place is None or (places and place <= places[-1]):
            return None
        places.append(place)
    result = x
    for place in range(rank):
        if place not in places:
            result = new.unsqueeze(result, place)
    return result if new.shape(result) == node.meta.shape else None


def _picked(x: Ref, rows: Ref, columns: Ref, node: Node, new: Draft) -> Ref | None:
    """``x[arange(b), i]``, one position of each sample, as a gather along dim 1."""
    size, *rest = new.shape(x)[0], *new.shape(x)[2:]
    if new.shape(rows) != (size,) or new.shape(columns) != (size,) or _counts(rows, size, 1, new) is None:
        return None
    places = new.cast(columns, "int64")
    for place in range(1, len(new.shape(x))):
        places = new.unsqueeze(places, place)
    shape = (size, 1, *rest)
    if rest:
        places = new.expand(places, shape)
    taken = Ref(new.emit("aten.gather", x, 1, places, shape=shape))
    return new.squeeze(taken, 1)


def gather(node: Node, new: Draft) -> Ref | None:
    """Values gathered from a table that every row shares are looked up in it: ``x[index]``."""
    x, dim, places = node.args[:3]
    thin = _thin(x, new)
    if thin == x or len(node.args) > 3 or any(size != 1 for at, size in enumerate(new.shape(thin)) if at != dim):
        return None
    for _ in new.shape(thin)[:dim]:
        thin = new.squeeze(thin, 0)
    for _ in new.shape(thin)[1:]:
        thin = new.squeeze(thin, 1)
    return Ref(new.emit("aten.index", thin, (places,), shape=node.meta.shape))


def _counts(value: Ref, size: int | Size, rank: int, new: Draft) -> int | None:
    """The dim, of ``rank``, along which ``value`` counts 0, 1, 2, ... ``size`` - 1, all its other dims being one."""
    shape = new.shape(value)
    long = [dim for dim, length in enumerate(shape) if length != 1]
    while (inner := new.producer(value, "aten.unsqueeze")) is not None:
        value = inner.args[0]
    counting = new.producer(value, "aten.arange")
    if len(long) != 1 or not counting or counting.args[-1] != size or counting.args[:-1] not in ((), (0,)):
        return None
    return long[0] + rank - len(shape)


RULES: dict[str, list[Rule]] = {
    **{f"aten.{name}": [elementwise] for name in (*UNARY.split(), *BROADCASTING.split())},
    "autopar.cast": [elementwise],
    "aten.embedding": [embedding],
    "aten.scaled_dot_product_attention": [mask],
    "aten.index": [index],
    "aten.gather": [gather],
}
