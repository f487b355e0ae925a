"""Leading dims that were flattened move down to where they are put apart again.

Models flatten (batch, sequence) to tokens for a router or a matrix product, and put it back after. What runs in between
does not care: it runs on the dims as they are, which a split by batch or by sequence then finds where they always are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autopar.graph.draft import Draft, Rule
from autopar.graph.ir import Node, Ref, map_refs
from autopar.graph.size import Size

ELEMENTWISE = """
neg abs relu gelu silu sigmoid tanh exp log sqrt rsqrt logical_not bitwise_not clamp clamp_min clamp_max square
softplus log_sigmoid zeros_like ones_like full_like add sub mul div pow maximum minimum eq ne lt le gt ge logical_and
logical_or logical_xor bitwise_and bitwise_or where masked_fill detach
"""
ALONG = {
    "aten.softmax": 1,
    "aten.log_softmax": 1,
    "aten.sum": 1,
    "aten.mean": 1,
    "aten.amax": 1,
    "aten.argmax": 1,
    "aten.cumsum": 1,
    "autopar.topk": 2,
    "aten.gather": 1,
    "aten.scatter": 1,
    "aten.unsqueeze": 1,
    "aten.squeeze": 1,
    "aten.select": 1,
    "aten.slice": 1,
}
"""Operators along a dim (or several), and which argument names it."""

PAIRS = ("aten.flatten", "aten.transpose")
"""Operators on two dims, their second and third argument."""


def _inner(value: Any, new: Draft) -> tuple[Ref, int] | None:
    """What ``value`` flattens the leading dims of, and how many more dims that has."""
    flat = new.producer(value, "aten.flatten")
    return (flat.args[0], flat.args[2]) if flat and flat.args[1] == 0 else None


def _repeated(name: str, new: Draft) -> Ref | None:
    """What ``name`` repeats along its leading dim, without that dim."""
    wide = new.producer(Ref(name), "aten.expand")
    if wide is None:
        return None
    thin: Ref = wide.args[0]
    shape = new.shape(thin)
    if len(shape) < len(wide.meta.shape):
        return thin
    return new.squeeze(thin, 0) if shape[0] == 1 else None


def _moved(node: Node, new: Draft, args: tuple[Any, ...], tensors: Sequence[str] | None = None) -> Ref | None:
    """``node`` with ``args``, its ``tensors`` (all it reads, if not told) taken before they were flattened; its result
    is flattened instead. None unless all of them were flattened alike, have no such dim, or are the same all along it.
    """
    found: dict[str, Ref] = {}
    same: dict[str, Ref] = {}
    leads: set[tuple[int | Size, ...]] = set()
    for name in node.operands() if tensors is None else tensors:
        inner = _inner(Ref(name), new)
        if inner is not None:
            found[name] = inner[0]
            leads.add(new.shape(inner[0])[: inner[1] + 1])
        elif node.op == "aten.gather" and (thin := _repeated(name, new)) is not None:
            same[name] = thin
        elif len(new.shape(name)) >= len(node.meta.shape):
            return None
    if len(leads) != 1:
        return None
    lead = leads.pop()
    for name, thin in same.items():
        found[name] = new.expand(thin, (*lead, *new.shape(name)[1:]))

    def whole(name: str) -> str:
        return found[name].name if name in found else name

    args, options = map_refs(args, whole), map_refs(node.kwargs, whole)
    result = new.emit(node.op, *args, shape=(*lead, *node.meta.shape[1:]), dtype=node.meta.dtype, options=options)
    return new.flatten(Ref(result), 0, len(lead) - 1)


def elementwise(node: Node, new: Draft) -> Ref | None:
    return _moved(node, new, node.args) if node.meta.shape else None


def along(node: Node, new: Draft) -> Ref | None:
    inner, place = _inner(node.args[0], new), ALONG[node.op]
    if inner is None or len(node.args) <= place or not node.meta.shape:
        return None
    dims, more = node.args[place], inner[1]
    if dims is None or dims == () or 0 in (dims if isinstance(dims, tuple) else (dims,)):
        return None
    shifted = tuple(dim + more for dim in dims) if isinstance(dims, tuple) else dims + more
    return _moved(node, new, (*node.args[:place], shifted, *node.args[place + 1 :]))


def pair(node: Node, new: Draft) -> Ref | None:
    inner = _inner(node.args[0], new)
    if inner is None or len(node.args) != 3 or 0 in node.args[1:]:
        return None
    return _moved(node, new, (node.args[0], *(dim + inner[1] for dim in node.args[1:])))


def unflatten(node: Node, new: Draft) -> Ref | None:
    x, dim, sizes = node.args
    inner = _inner(x, new)
    return _moved(node, new, (x, dim + inner[1], sizes)) if inner and dim else None


def expand(node: Node, new: Draft) -> Ref | None:
    x, inner = node.args[0], _inner(node.args[0], new)
    if inner is None or len(new.shape(x)) != len(node.meta.shape) or new.shape(x)[0] != node.meta.shape[0]:
        return None
    shape = (*new.shape(inner[0])[: inner[1] + 1], *node.meta.shape[1:])
    return _moved(node, new, (x, shape))


def experts(node: Node, new: Draft) -> Ref | None:
    """The weights of all experts stay as they are."""
    return _moved(node, new, node.args, [value.name for value in node.args[:3]])


RULES: dict[str, list[Rule]] = {
    **{f"aten.{name}": [elementwise] for name in ELEMENTWISE.split()},
    "autopar.cast": [elementwise],
    "autopar.drawn": [elementwise],
    **{op: [along] for op in ALONG},
    **{op: [pair] for op in PAIRS},
    "aten.unflatten": [unflatten],
    "aten.expand": [expand],
    "autopar.experts": [experts],
}
