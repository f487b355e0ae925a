"""Buffers whose values follow a formula become that formula: emitted code can compute them, whatever their size.

Positions in order, one number everywhere, a band of a square matrix, as causal and local masks are kept
(`autopar.graph.masks` recognises what they mean), and tables of positions (`autopar.graph.sinusoids`,
`autopar.graph.angle_tables`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from autopar.graph.angle_tables import angles_of
from autopar.graph.buffers import SMALLEST, value_of
from autopar.graph.draft import Draft, live
from autopar.graph.ir import Node, Ref, map_refs
from autopar.graph.sinusoids import table_of


def unfold_buffers(draft: Draft, model: nn.Module, constants: Mapping[str, torch.Tensor]) -> Draft:
    """``draft`` with the buffers of ``model``, and the other tensors (``constants``) that it holds, computed by their
    formula where they follow one."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    new = Draft(_taken=frozenset(draft.nodes))
    names: dict[str, str] = {}
    for node in draft.nodes.values():
        if node.kind == "buffer" and (node.target in buffers or node.target in constants):
            new.module = node.target.rpartition(".")[0]
            if (computed := _computed(node, model, constants, new)) is not None:
                names[node.name] = computed.name
                continue
        args, kwargs = map_refs(node.args, names.__getitem__), map_refs(node.kwargs, names.__getitem__)
        new.module = node.module
        names[node.name] = new.add(replace(node, args=args, kwargs=kwargs))
    new.output = names[draft.output]
    return live(new)


def _computed(node: Node, model: nn.Module, constants: Mapping[str, torch.Tensor], new: Draft) -> Ref | None:
    """The value of a buffer by its formula, if it has one."""
    shape, dtype = node.meta.shape, node.meta.dtype
    buffer = constants[node.target] if node.target in constants else value_of(model, node.target)
    if (plain := _plain(buffer, node, new)) is not None or len(shape) < 2:
        return plain
    if (band := band_of(buffer)) is not None:
        return _positions(new, *band, dtype, len(shape))
    if (table := table_of(buffer)) is not None:
        given = table if table[-1] is not None else table[:-1]
        return Ref(new.emit("autopar.sinusoids", *given, shape=shape, dtype=dtype, options={"dtype": dtype}))
    if (turned := angles_of(buffer)) is not None:
        own = tuple(size for size in shape if size != 1)
        made = Ref(new.emit("autopar.angle_table", *turned, shape=own, dtype=dtype, options={"dtype": dtype}))
        return made if own == shape else Ref(new.emit("aten.reshape", made, shape, shape=shape))
    return None


def _plain(buffer: torch.Tensor | None, node: Node, new: Draft) -> Ref | None:
    """One number everywhere, or whole numbers in order along the last dim, the only one."""
    shape, dtype = node.meta.shape, node.meta.dtype
    if buffer is None or buffer.is_meta or buffer.is_complex() or buffer.numel() < SMALLEST:
        return None
    values = buffer.reshape(-1)
    if bool((values == values[0]).all()):
        number = values[0].item()
        return Ref(new.emit("aten.full", shape, number, shape=shape, dtype=dtype, options={"dtype": dtype}))
    count = values.numel()
    if dtype != "int64" or buffer.shape[-1] != count or not torch.equal(values, torch.arange(count) + values[0]):
        return None
    places = Ref(new.emit("aten.arange", count, shape=(count,), dtype=dtype))
    if first := int(values[0]):
        places = Ref(new.emit("aten.add", places, first, shape=(count,)))
    for _ in shape[1:]:
        places = new.unsqueeze(places, 0)
    return places


def band_of(buffer: torch.Tensor | None) -> tuple[int, int, int] | None:
    """(n, low, high) of an [.., n, n] buffer that is 1 where low <= row - column <= high, else 0; None if it is not."""
    if buffer is None or buffer.is_meta or buffer.ndim < 2 or buffer.numel() < SMALLEST:
        return None
    size = buffer.shape[-1]
    if buffer.shape[-2] != size or buffer.numel() != size * size:
        return None
    ones = buffer.reshape(size, size) != 0
    if not bool((buffer.reshape(size, size)[ones] == 1).all()) or not bool(ones.any()) or bool(ones.all()):
        return None
    last = size - 1
    low = next((-column for column in range(last, 0, -1) if ones[0, column]), None)
    high = next((row for row in range(last, 0, -1) if ones[row, 0]), None)
    low = (0 if ones[0, 0] else None) if low is None else low
    high = (0 if ones[0, 0] else None) if high is None else high
    if low is None or high is None:
        return None
    places = torch.arange(size)
    distance = places.unsqueeze(1) - places
    return (size, low, high) if torch.equal(ones, (distance >= low) & (distance <= high)) else None


def _positions(new: Draft, size: int, low: int, high: int, dtype: str, rank: int) -> Ref:
    places = Ref(new.emit("aten.arange", size, shape=(size,), dtype="int64"))
    rows = new.unsqueeze(places, 1)
    columns = new.unsqueeze(places, 0)
    square = (size, size)
    distance = Ref(new.emit("aten.sub", rows, columns, shape=square))
    band: Ref | None = None
    for op, edge, open_end in (("aten.ge", low, 1 - size), ("aten.le", high, size - 1)):
        if edge == open_end:
            continue
        side = Ref(new.emit(op, distance, edge, shape=square, dtype="bool"))
        band = side if band is None else Ref(new.emit("aten.bitwise_and", band, side, shape=square))
    assert band is not None  # not all ones
    band = new.cast(band, dtype)
    for _ in range(rank - 2):
        band = new.unsqueeze(band, 0)
    return band
