"""Complex arithmetic written in real numbers.

Rotary embeddings are sometimes written as a product of complex numbers. No collective and few kernels take complex
tensors, so where real numbers are made of a complex value again (`view_as_real`), it is computed from the real and
imaginary parts of what it was made of.
"""

from __future__ import annotations

from autopar.graph.draft import Draft, Rule
from autopar.graph.ir import Node, Ref
from autopar.graph.size import Size

Parts = tuple[Ref, Ref | None]
"""The real and the imaginary part; None for a real value."""

MOVES = frozenset({"unsqueeze", "squeeze", "reshape", "transpose", "slice", "select", "expand", "flatten", "unflatten"})
"""Operators that move elements, of which a complex value's are those of its parts."""


def real_pairs(node: Node, new: Draft) -> Ref | None:
    """view_as_real(x) → stack((real part of x, imaginary part of x), -1)."""
    value: Ref = node.args[0]
    if value.name in new.constant or new.producer(value, "aten.view_as_complex"):
        return _plain(value, new)
    parts = _parts(value, new)
    if parts is None or parts[1] is None:
        return None
    shape = node.meta.shape
    wide = [new.unsqueeze(_sized(part, shape[:-1], new), len(shape) - 1) for part in parts if part is not None]
    return Ref(new.emit("aten.cat", tuple(wide), len(shape) - 1, shape=shape, dtype=node.meta.dtype))


def _plain(value: Ref, new: Draft) -> Ref | None:
    """What `view_as_complex` was given."""
    made = new.producer(value, "aten.view_as_complex")
    return made.args[0] if made else None


def _parts(value: Ref, new: Draft) -> Parts | None:
    """The parts of ``value``, as far as it is made by operators known here."""
    node = new.nodes[value.name]
    name, dtype = node.op.removeprefix("aten."), node.meta.dtype
    if not dtype.startswith("complex"):
        return value, None
    if value.name in new.constant:
        pairs = Ref(new.emit("aten.view_as_real", value, shape=(*node.meta.shape, 2), dtype=REAL[dtype]))
        return _taken(pairs, new)
    if name == "view_as_complex":
        return _taken(node.args[0], new)
    if name in MOVES:
        moved = _parts(node.args[0], new)
        if moved is None or moved[1] is None:
            return None
        real, imaginary = (
            Ref(new.emit(node.op, part, *node.args[1:], shape=node.meta.shape, options=node.kwargs))
            for part in (moved[0], moved[1])
        )
        return real, imaginary
    if name == "mul" and not node.kwargs and all(isinstance(each, Ref) for each in node.args):
        left, right = (_parts(each, new) for each in node.args)
        return None if left is None or right is None else _product(left, right, node, new)
    return None


def _product(left: Parts, right: Parts, node: Node, new: Draft) -> Parts:
    def times(a: Ref, b: Ref) -> Ref:
        return Ref(new.emit("aten.mul", a, b, shape=node.meta.shape, dtype=REAL[node.meta.dtype]))

    def total(op: str, a: Ref, b: Ref) -> Ref:
        return Ref(new.emit(op, a, b, shape=node.meta.shape))

    (a, b), (c, d) = left, right
    if b is None or d is None:
        real, other, imaginary = (a, c, d) if b is None else (c, a, b)
        assert imaginary is not None  # the product is complex
        return times(real, other), times(real, imaginary)
    return total("aten.sub", times(a, c), times(b, d)), total("aten.add", times(a, d), times(b, c))


def _taken(pairs: Ref, new: Draft) -> Parts:
    last = len(new.shape(pairs)) - 1
    return new.select(pairs, last, 0), new.select(pairs, last, 1)


def _sized(x: Ref, shape: tuple[int | Size, ...], new: Draft) -> Ref:
    return x if new.shape(x) == shape else new.expand(x, shape)


REAL = {"complex64": "float32", "complex128": "float64"}

RULES: dict[str, list[Rule]] = {"aten.view_as_real": [real_pairs]}
