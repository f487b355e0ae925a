"""Random numbers that a model draws: what is a dropout by another name becomes one, others become `autopar.drawn`.

Stochastic depth ("drop path", arXiv 1603.09382) multiplies what a layer adds by a number for each sample: one with the
chance to keep, else zero. That is the dropout of a tensor of ones, whose masks emitted code knows how to draw on every
rank. Other numbers of a plain distribution (the noise of a router) are drawn in the shape of a tensor, alike by ranks
that hold the same part of it and apart by others, and whole numbers from them. What is neither (permutations) is
refused.
"""

from __future__ import annotations

from typing import Any

from autopar.errors import UnsupportedError
from autopar.graph.draft import RANDOM, Draft, Rule
from autopar.graph.exported import is_number
from autopar.graph.ir import Node, Ref


def kept(node: Node, new: Draft) -> Ref | None:
    """floor(rand + chance) → dropout(ones, 1 - chance) * chance."""
    total = new.producer(node.args[0], "aten.add")
    if not total or len(total.args) != 2 or total.kwargs:
        return None
    for drawn, chance in (total.args, total.args[::-1]):
        uniform = new.producer(drawn, "autopar.drawn")
        if uniform and uniform.args[1] == "uniform" and is_number(chance) and 0 < chance <= 1:
            return _ones_dropped(node, float(chance), new)
    return None


def marked(node: Node, new: Draft) -> Ref | None:
    """bernoulli(chance) → dropout(ones, 1 - chance) * chance."""
    chance: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("p")
    return _ones_dropped(node, float(chance), new) if is_number(chance) and 0 < chance <= 1 else None


def _ones_dropped(node: Node, chance: float, new: Draft) -> Ref:
    shape, dtype = node.meta.shape, node.meta.dtype
    ones = Ref(new.emit("aten.full", shape, 1.0, shape=shape, dtype=dtype, options={"dtype": dtype}))
    if chance == 1:
        return ones
    dropped = Ref(new.emit("aten.dropout", ones, 1 - chance, True, shape=shape))
    return Ref(new.emit("aten.mul", dropped, chance, shape=shape))


_KINDS = {
    "aten.rand": "uniform",
    "aten.rand_like": "uniform",
    "aten.uniform": "uniform",
    "aten.randn": "normal",
    "aten.randn_like": "normal",
    "aten.normal": "normal",
    "aten.normal_functional": "normal",
    "aten.exponential": "exponential",
}
_BLANK = ("aten.empty_like", "aten.zeros_like", "aten.ones_like", "autopar.drawn", "aten.detach")
"""What gives a tensor for its shape, or one whose values are drawn anew."""


def numbers(node: Node, new: Draft) -> Ref | None:
    """rand(shape), x.uniform_(a, b), x.normal_(mean, std), x.exponential_(rate) → drawn(x, kind), scaled, shifted."""
    kind, shape, dtype = _KINDS[node.op], node.meta.shape, node.meta.dtype
    given = {"from": 0.0, "to": 1.0, "mean": 0.0, "std": 1.0, "lambd": 1.0}
    if isinstance(node.args[0], Ref):
        like: Ref = node.args[0]
        while (made := new.producer(like, _BLANK)) is not None and isinstance(made.args[0], Ref):
            like = made.args[0]
        names = {"uniform": ("from", "to"), "normal": ("mean", "std")}.get(kind, ("lambd",))
        own = dict(zip(names, node.args[1:], strict=False))
        given |= own | {key: value for key, value in node.kwargs.items() if key in given}
    else:
        like = Ref(new.emit("aten.full", shape, 0.0, shape=shape, dtype=dtype, options={"dtype": dtype}))
    if not all(is_number(value) for value in given.values()) or new.shape(like) != shape:
        return None
    if new.meta(like.name).dtype != dtype:
        like = Ref(new.emit("autopar.cast", like, dtype, shape=shape, dtype=dtype))
    if new.meta(like.name).requires_grad:
        like = Ref(new.emit("aten.detach", like, shape=shape))
    drawn = Ref(new.emit("autopar.drawn", like, kind, shape=shape))
    scale, shift = {
        "uniform": (given["to"] - given["from"], given["from"]),
        "normal": (given["std"], given["mean"]),
        "exponential": (1 / given["lambd"], 0.0),
    }[kind]
    if scale != 1:
        drawn = Ref(new.emit("aten.mul", drawn, scale, shape=shape))
    return Ref(new.emit("aten.add", drawn, shift, shape=shape)) if shift else drawn


WHOLE = ("aten.randint", "aten.randint_like")
MOST = 1 << 24
"""Whole numbers that uniform ones in float32 tell apart."""


def whole_numbers(node: Node, new: Draft) -> Ref | None:
    """randint(low, high, shape), randint_like(x, low, high) → the whole parts of uniform numbers from low to high."""
    bounds = [arg for arg in node.args if type(arg) is int]
    if not bounds or (high := bounds[-1]) - (low := bounds[0] if len(bounds) > 1 else 0) > MOST:
        return None
    shape, options = node.meta.shape, {"dtype": "float32"}
    like = Ref(new.emit("aten.full", shape, 0.0, shape=shape, dtype="float32", options=options))
    drawn = Ref(new.emit("autopar.drawn", like, "uniform", shape=shape))
    whole = Ref(new.emit("aten.floor", Ref(new.emit("aten.mul", drawn, high - low, shape=shape)), shape=shape))
    whole = new.cast(whole, node.meta.dtype)
    return Ref(new.emit("aten.add", whole, low, shape=shape)) if low else whole


def refuse_others(draft: Draft) -> None:
    """Raise UnsupportedError for random numbers that are no dropout."""
    for node in draft.nodes.values():
        if node.op in RANDOM and node.op not in ("aten.dropout", "autopar.drawn"):
            place = f"module {node.module!r}" if node.module else "the model"
            raise UnsupportedError(
                f"{place} draws random numbers ({node.op}); autopar knows dropout, of elements or of whole samples "
                "(x * floor(keep + rand) / keep), and uniform, normal, exponential and whole numbers; make what draws "
                "them a leaf (autopar.leaf), or hand them in as inputs"
            )


RULES: dict[str, list[Rule]] = {
    "aten.floor": [kept],
    "aten.bernoulli": [marked],
    **{op: [numbers] for op in _KINDS},
    **{op: [whole_numbers] for op in WHOLE},
}
