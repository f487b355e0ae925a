"""Random numbers that a model draws: what is a dropout by another name becomes one, the rest is refused.

Stochastic depth ("drop path", arXiv 1603.09382) multiplies what a layer adds by a number for each sample: one with the
chance to keep, else zero. That is the dropout of a tensor of ones, whose masks emitted code knows how to draw on every
rank. Numbers drawn for something else would have to be drawn alike by ranks that hold the same and apart by others.
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
        if new.producer(drawn, ("aten.rand", "aten.rand_like")) and is_number(chance) and 0 < chance <= 1:
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


def refuse_others(draft: Draft) -> None:
    """Raise UnsupportedError for random numbers that are no dropout."""
    for node in draft.nodes.values():
        if node.op in RANDOM and node.op != "aten.dropout":
            place = f"module {node.module!r}" if node.module else "the model"
            raise UnsupportedError(
                f"{place} draws random numbers ({node.op}); autopar knows dropout, of elements or of whole samples "
                "(x * floor(keep + rand) / keep); make what draws them a leaf (autopar.leaf), or hand them in as inputs"
            )


RULES: dict[str, list[Rule]] = {"aten.floor": [kept], "aten.bernoulli": [marked]}
