"""Composite operators recognised from their pieces: norms, rotary embedding, GELU, grouped-query attention.

A rule looks backwards from the last piece. What does not match stays in pieces, which have rules of their own.
"""

from __future__ import annotations

import math
from typing import Any

from autopar.graph.draft import Draft, Rule
from autopar.graph.exported import close, is_number
from autopar.graph.ir import COMPUTE, Node, Ref


def _either(node: Node) -> tuple[tuple[Any, Any], ...]:
    """The operands of a commutative operator in both orders."""
    first, second = node.args[:2]
    return ((first, second), (second, first))


def _plain(node: Node | None) -> Node | None:
    """``node`` if it takes two operands and nothing else."""
    return node if node and len(node.args) == 2 and not node.kwargs else None


def rms_core(node: Node, new: Draft) -> Ref | None:
    """x * rsqrt(mean(x^2, -1) + eps) → rms_norm(x, (width,), None, eps)."""
    if not _plain(node):
        return None
    for x, factor in _either(node):
        rsqrt = new.producer(factor, "aten.rsqrt")
        shifted = _plain(new.producer(rsqrt.args[0], "aten.add")) if rsqrt else None
        if not shifted or not isinstance(x, Ref):
            continue
        for mean_ref, eps in _either(shifted):
            mean = new.producer(mean_ref, "aten.mean")
            shape = new.shape(x)
            if new.meta(x).dtype == COMPUTE and node.meta.dtype == "float32":
                x = new.cast(x, "float32")  # widened by the product itself
            if not mean or not is_number(eps) or mean.args[1:] != ((len(shape) - 1,), True) or mean.kwargs:
                continue
            square = new.producer(mean.args[0], ("aten.pow", "aten.mul", "aten.square"))
            if (
                square
                and square.args
                in {"aten.pow": ((x, 2), (x, 2.0)), "aten.mul": ((x, x),), "aten.square": ((x,),)}[square.op]
            ):
                return Ref(new.emit("aten.rms_norm", x, (shape[-1],), None, eps, shape=shape))
    return None


def rms_cast(node: Node, new: Draft) -> Ref | None:
    """The norm computes in float32 inside: cast(rms_norm(cast(x, float32)), compute) → rms_norm(x)."""
    x, dtype = node.args
    norm = new.producer(x, "aten.rms_norm")
    up = new.producer(norm.args[0], "autopar.cast") if norm else None
    if not norm or not up or up.args[1] != "float32" or _weight_and_eps(norm)[0] is not None:
        return None
    if new.meta(up.args[0]).dtype != dtype:
        return None
    return Ref(new.emit("aten.rms_norm", up.args[0], *norm.args[1:], shape=norm.meta.shape))


def _weight_and_eps(norm: Node) -> tuple[Any, Any]:
    """Of an rms_norm, whose last arguments may be left out."""
    weight, eps = (*norm.args[2:], None, None)[:2]
    return weight, eps


def rms_weight(node: Node, new: Draft) -> Ref | None:
    """weight * rms_norm(x) → rms_norm(x, (width,), weight, eps)."""
    if not _plain(node):
        return None
    for weight, value in _either(node):
        norm = new.producer(value, "aten.rms_norm")
        if not norm or not isinstance(weight, Ref):
            continue
        x, width = norm.args[:2]
        own, eps = _weight_and_eps(norm)
        if own is None and new.meta(weight).shape == width and new.meta(weight).dtype == norm.meta.dtype:
            return Ref(new.emit("aten.rms_norm", x, width, weight, eps, shape=norm.meta.shape))
    return None


def rotary(node: Node, new: Draft) -> Ref | None:
    """x*cos + cat(-x2, x1)*sin, halves of the last dim → autopar.rotary(x, cos, sin)."""
    if not _plain(node):
        return None
    for plain_ref, turned_ref in _either(node):
        plain, turned = _plain(new.producer(plain_ref, "aten.mul")), _plain(new.producer(turned_ref, "aten.mul"))
        if not plain or not turned:
            continue
        for half, sin in _either(turned):
            x = _rotated(half, new)
            for base, cos in _either(plain):
                found = x is not None and base == x and isinstance(cos, Ref) and isinstance(sin, Ref)
                if found and node.meta.shape == new.shape(base):
                    args = (base, cos, sin)
                    return Ref(new.emit("autopar.rotary", *args, shape=node.meta.shape, dtype=node.meta.dtype))
    return None


def _rotated(value: Any, new: Draft) -> Ref | None:
    """The x of cat((-second half of x, first half of x), last dim)."""
    cat = new.producer(value, "aten.cat")
    if not cat or len(cat.args[0]) != 2:
        return None
    dim = cat.args[1] if len(cat.args) > 1 else 0
    negated = new.producer(cat.args[0][0], "aten.neg")
    if not negated or dim != len(cat.meta.shape) - 1:
        return None
    second, first = _half(negated.args[0], dim, 1, new), _half(cat.args[0][1], dim, 0, new)
    return first if first is not None and first == second else None


def _half(value: Any, dim: int, which: int, new: Draft) -> Ref | None:
    """The x of which ``value`` is the first (0) or second (1) half along ``dim``."""
    part = new.producer(value, "aten.slice")
    if part:
        x, at, start, end = part.args
        width = new.shape(x)[dim]
        if at == dim and isinstance(width, int) and (start, end) == (which * width // 2, (which + 1) * width // 2):
            return x  # type: ignore[no-any-return]
    part = new.producer(value, "aten.select")
    blocks = new.producer(part.args[0], "aten.unflatten") if part and part.args[1:] == (dim, which) else None
    return blocks.args[0] if blocks and blocks.args[1:] == (dim, (2, -1)) else None


def gelu(node: Node, new: Draft) -> Ref | None:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) → gelu(x, "tanh"); 0.5 x (1 + erf(x/sqrt 2)) → gelu(x)."""
    for left, right in _either(node):
        half = _scaled(left, 0.5, new)
        tanh = new.producer(_shifted(right, 1.0, new), ("aten.tanh", "aten.erf"))
        if half is None or not tanh:
            continue
        if tanh.op == "aten.erf":
            if _scaled(tanh.args[0], math.sqrt(0.5), new) == half:
                return Ref(new.emit("aten.gelu", half, shape=node.meta.shape))
            continue
        total = _plain(new.producer(_scaled(tanh.args[0], math.sqrt(2 / math.pi), new), "aten.add"))
        for x, cubic in _either(total) if total else ():
            cube = new.producer(_scaled(cubic, 0.044715, new), "aten.pow")
            if x == half and cube and cube.args[0] == x and close(cube.args[1], 3):
                return Ref(new.emit("aten.gelu", x, "tanh", shape=node.meta.shape))
    return None


def _scaled(value: Any, factor: float, new: Draft) -> Ref | None:
    """The x of x * factor (or x / (1 / factor))."""
    product = _plain(new.producer(value, "aten.mul"))
    for x, number in _either(product) if product else ():
        if close(number, factor):
            return x  # type: ignore[no-any-return]
    quotient = _plain(new.producer(value, "aten.div"))
    return quotient.args[0] if quotient and close(quotient.args[1], 1 / factor) else None


def _shifted(value: Any, offset: float, new: Draft) -> Ref | None:
    total = _plain(new.producer(value, "aten.add"))
    for x, number in _either(total) if total else ():
        if close(number, offset):
            return x  # type: ignore[no-any-return]
    return None


def silu(node: Node, new: Draft) -> Ref | None:
    """x * sigmoid(x) → silu(x)."""
    if _plain(node):
        for x, gate in _either(node):
            sigmoid = new.producer(gate, "aten.sigmoid")
            if sigmoid and sigmoid.args == (x,):
                return Ref(new.emit("aten.silu", x, shape=node.meta.shape))
    return None


def shifted_softmax(node: Node, new: Draft) -> Ref | None:
    """softmax(x - m) → softmax(x), where m is one number along the dim: it changes neither result nor gradients."""
    shift = _plain(new.producer(node.args[0], "aten.sub"))
    dim = node.args[1]
    if not shift or not all(isinstance(value, Ref) for value in shift.args):
        return None
    x, number = shift.args
    if new.shape(x) != node.meta.shape or new.meta(x).dtype != node.meta.dtype:
        return None
    shape = new.shape(number)
    if len(shape) != len(node.meta.shape) or shape[dim] != 1:
        return None
    return Ref(new.emit(node.op, x, *node.args[1:], shape=node.meta.shape, options=node.kwargs))


def grouped_query(node: Node, new: Draft) -> Ref | None:
    """Keys and values repeated for each query head of their group → enable_gqa."""
    q, k, v = node.args
    keys, values = unrepeated(k, new), unrepeated(v, new)
    if keys is None or values is None or node.kwargs.get("enable_gqa") or new.shape(keys)[:2] != new.shape(values)[:2]:
        return None
    return Ref(new.emit(node.op, q, keys, values, shape=node.meta.shape, options={**node.kwargs, "enable_gqa": True}))


def unrepeated(value: Ref, new: Draft) -> Ref | None:
    """The [b, groups, s, d] whose heads ``value`` repeats next to each other."""
    repeat = new.producer(value, "aten.repeat_interleave")
    if repeat and len(repeat.args) == 3 and isinstance(repeat.args[1], int) and repeat.args[2] == 1:
        return repeat.args[0]  # type: ignore[no-any-return]
    flat = new.producer(value, "aten.flatten")
    wide = new.producer(flat.args[0], "aten.expand") if flat and flat.args[1:] == (1, 2) else None
    thin = new.producer(wide.args[0], "aten.unsqueeze") if wide else None
    if not thin or thin.args[1] != 2 or not wide:
        return None
    x: Ref = thin.args[0]
    shape, expanded = new.shape(x), wide.meta.shape
    return x if len(shape) == 4 and (*expanded[:2], *expanded[3:]) == shape else None


RULES: dict[str, list[Rule]] = {
    "aten.mul": [rms_core, rms_weight, gelu, silu],
    "autopar.cast": [rms_cast],
    "aten.add": [rotary],
    "aten.softmax": [shifted_softmax],
    "aten.scaled_dot_product_attention": [grouped_query],
}
