"""Tensors joined by `cat`: what is cut out again is taken from its piece, and a constant piece at an end is padding."""

from __future__ import annotations

from autopar.graph.draft import Draft, Rule
from autopar.graph.ir import Node, Ref
from autopar.graph.size import Size

Number = int | float | bool


def slice_of_cat(node: Node, new: Draft) -> Ref | None:
    """A slice that ends where pieces end is these pieces, joined."""
    x, dim, start, end = node.args[:4]
    joined = new.producer(x, "aten.cat")
    if joined is None or len(node.args) > 4 or (joined.args[1] if len(joined.args) > 1 else 0) != dim:
        return None
    ends: list[int | Size] = [0]
    for piece in joined.args[0]:
        ends.append(ends[-1] + new.shape(piece)[dim])
    if start not in ends or end not in ends:
        return None
    pieces = joined.args[0][ends.index(start) : ends.index(end)]
    if len(pieces) == 1:
        return pieces[0]  # type: ignore[no-any-return]
    return Ref(new.emit("aten.cat", tuple(pieces), dim, shape=node.meta.shape)) if pieces else None


def slice_of_padding(node: Node, new: Draft) -> Ref | None:
    """A slice that takes nothing of the padding is one of what was padded."""
    x, dim, start, end = node.args[:4]
    padded = new.producer(x, "aten.pad")
    if padded is None or len(node.args) > 4 or padded.args[2:3] not in ((), ("constant",)):
        return None
    before, after = padded.args[1][2 * (len(node.meta.shape) - 1 - dim) :][:2] or (0, 0)
    margins = (start - before, new.shape(x)[dim] - after - end)
    elsewhere = any(pads for place, pads in enumerate(padded.args[1]) if place // 2 != len(node.meta.shape) - 1 - dim)
    if elsewhere or not all(isinstance(margin, int) and margin >= 0 for margin in margins):
        return None
    return new.slice(padded.args[0], dim, start - before, end - before)


def padding(node: Node, new: Draft) -> Ref | None:
    """``cat((full, x))`` and ``cat((x, full))`` are ``pad(x)``: what shifts token ids to the right."""
    pieces, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if len(pieces) != 2:
        return None
    for place, piece in enumerate(pieces):
        number, rest = _number(piece, new), pieces[1 - place]
        count = new.shape(piece)[dim]
        if number is None or not isinstance(count, int) or rest.name in new.constant:
            continue
        before = (count, 0) if place == 0 else (0, count)
        pads = (*(0,) * (2 * (len(node.meta.shape) - 1 - dim)), *before)
        return new.pad(rest, pads, number)
    return None


def _number(value: Ref, new: Draft) -> Number | None:
    """The number that all elements of ``value`` are, if it is written as one."""
    node = new.nodes[value.name]
    while node.op in ("aten.unsqueeze", "aten.squeeze", "aten.slice", "aten.select", "aten.expand", "aten.reshape"):
        node = new.nodes[node.args[0].name]
    if node.op in ("aten.zeros", "aten.new_zeros", "aten.zeros_like"):
        return 0
    if node.op in ("aten.ones", "aten.new_ones", "aten.ones_like"):
        return 1
    place = {"aten.full": 1, "aten.full_like": 1, "aten.new_full": 2}.get(node.op)
    number = node.args[place] if place is not None else None
    return number if isinstance(number, int | float) else None


RULES: dict[str, list[Rule]] = {"aten.slice": [slice_of_cat, slice_of_padding], "aten.cat": [padding]}
