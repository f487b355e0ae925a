"""Operators that are a few others, and are taken apart into them: what each is made of has rules."""

from __future__ import annotations

from collections.abc import Callable

from autopar.errors import UnsupportedError
from autopar.graph.draft import Draft
from autopar.graph.ir import Ref
from autopar.graph.size import divide


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
    *lead, width = draft.shape(x)
    out, _, other = draft.shape(weight)
    rows = Ref(draft.emit("aten.permute", weight, (0, 2, 1), shape=(out, other, width)))
    rows = draft.flatten(rows, 0, 1)
    product = Ref(draft.emit("aten.linear", x, rows, shape=(*lead, *draft.shape(rows)[:1])))
    product = draft.unflatten(product, len(lead), (out, other), free=1)
    product = Ref(draft.emit("aten.mul", product, draft.unsqueeze(y, len(lead)), shape=(*lead, out, other)))
    total = Ref(draft.emit("aten.sum", product, (len(lead) + 1,), shape=(*lead, out)))
    return total if bias is None else Ref(draft.emit("aten.add", total, bias, shape=(*lead, out)))


FORMULAS: dict[str, Callable[..., Ref]] = {"glu": glu, "bilinear": bilinear}
