"""Several index tensors at once, ``x[:, i, j]``, as one into the dims they index, flattened.

What two or more tensors pick of neighbouring dims (pairs of a DLRM's interactions, a triangle of a matrix, places of a
table of relative positions) is then a look-up along one dim, which has a rule.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autopar.graph.draft import Draft, Rule
from autopar.graph.ir import Node, Ref

_VIEWS = ("aten.unsqueeze", "aten.squeeze", "aten.expand", "aten.flatten", "aten.unflatten", "aten.t", "aten.transpose")


def rules(values: Mapping[str, torch.Tensor]) -> dict[str, list[Rule]]:
    """``values``: buffers known by full name."""

    def index(node: Node, new: Draft) -> Ref | None:
        x, entries = node.args
        dims = [dim for dim, entry in enumerate(entries) if entry is not None]
        sizes = [new.shape(x)[dim] for dim in dims]
        given = [entries[dim] for dim in dims]
        if len(dims) < 2 or dims != list(range(dims[0], dims[-1] + 1)):
            return None
        if not all(isinstance(size, int) for size in sizes) or any(new.meta(each).dtype == "bool" for each in given):
            return None
        place: Ref | None = None
        for each, size in zip(given, sizes, strict=True):
            if not _known_positive(each, new, values):
                each = Ref(new.emit("aten.remainder", each, size, shape=new.shape(each)))
            if place is None:
                place = each
                continue
            shape = new.broadcast(place, each)
            place = Ref(new.emit("aten.mul", place, size, shape=new.shape(place)))
            place = Ref(new.emit("aten.add", place, each, shape=shape, dtype="int64"))
        flat = new.flatten(x, dims[0], dims[-1])
        return Ref(new.emit("aten.index", flat, (*(None,) * dims[0], place), shape=node.meta.shape))

    return {"aten.index": [index]}


def _known_positive(value: Ref, new: Draft, values: Mapping[str, torch.Tensor]) -> bool:
    """Whether no element counts from the end."""
    while view := new.producer(value, _VIEWS):
        value = view.args[0]
    node = new.nodes[value.name]
    if node.kind == "buffer" and node.target in values:
        return bool((values[node.target] >= 0).all())
    counted = new.producer(value, "aten.arange")
    return counted is not None and (len(counted.args) < 2 or counted.args[0] in range(1 << 30))
