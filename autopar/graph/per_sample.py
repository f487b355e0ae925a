"""Constants that are the same for every sample lose their batch dim.

Models build masks and positions at the batch size, ``[b, 1, s, s]`` or even ``[b * heads, 1, s]``. Such a constant is
computed for one sample, and repeated where it is read (`autopar.graph.broadcasting` then drops the repetition where the
reader broadcasts by itself): ranks that hold parts of the batch could not share it otherwise.

That samples agree is seen by evaluating the constant at a few sizes, as masks are recognised (`autopar.graph.masks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from autopar.graph.draft import Draft, live
from autopar.graph.interpret import run_graph
from autopar.graph.ir import OpGraph, Ref, map_refs
from autopar.graph.masks import constant_graph
from autopar.graph.size import BATCH, Size, divide

SIZES = ((2, 5), (3, 8), (2, 16))
"""(samples, positions) at which a constant is evaluated."""


def share_samples(draft: Draft, values: Mapping[str, torch.Tensor]) -> Draft:
    """``draft`` with the operators that read constants of many equal samples reading those of one, repeated.

    ``values``: buffers known by full name.
    """
    new = Draft(_taken=frozenset(draft.nodes))
    names: dict[str, str] = {}
    found: dict[tuple[str, str], str | None] = {}
    for node in draft.nodes.values():
        if node.kind == "op":
            new.module = node.module
            if node.name not in draft.constant:
                for operand in dict.fromkeys(node.operands()):
                    key = operand, node.module  # each module repeats for itself, so that equal ones stay equal
                    if operand in draft.constant and key not in found:
                        found[key] = _repeated(draft, operand, values, new, names)
            read = {operand: found.get((operand, node.module)) or names[operand] for operand in node.operands()}
            args, kwargs = map_refs(node.args, read.__getitem__), map_refs(node.kwargs, read.__getitem__)
            node = replace(node, args=args, kwargs=kwargs)
        names[node.name] = new.add(node)
    new.output = names[draft.output]
    return live(new)


def _repeated(
    draft: Draft, name: str, values: Mapping[str, torch.Tensor], new: Draft, names: Mapping[str, str]
) -> str | None:
    """The constant as one sample repeated, added to ``new``; None if it has no batch dim, or samples differ."""
    shape = draft.shape(name)
    dims = [dim for dim, size in enumerate(shape) if _has_batch(size)]
    if len(dims) != 1 or draft.nodes[name].op == "aten.expand":
        return None  # an expansion is moved as it is
    (dim,) = dims
    heads = divide(shape[dim], BATCH)
    whole = constant_graph(draft, name)
    if heads is None or not _agree(whole, dim, values):
        return None
    copies: dict[str, str] = {}
    for node in whole.nodes.values():
        if node.kind == "op":
            args, kwargs = (_single(map_refs(part, copies.__getitem__)) for part in (node.args, node.kwargs))
            meta = replace(node.meta, shape=_single(node.meta.shape))
            copies[node.name] = new.add(replace(node, name=new.fresh(node.name), args=args, kwargs=kwargs, meta=meta))
        else:
            copies[node.name] = names[node.name]
    one = Ref(copies[name])
    if heads == 1:
        return new.expand(one, shape).name
    wide = new.expand(new.unsqueeze(one, dim), (*shape[:dim], BATCH, heads, *shape[dim + 1 :]))
    return new.flatten(wide, dim, dim + 1).name


def _has_batch(size: int | Size) -> bool:
    return isinstance(size, Size) and any(b > 0 for (b, _), _ in size.terms)


def _single(value: Any) -> Any:
    """``value`` with the batch size one in every size."""
    if isinstance(value, Size):
        terms: dict[tuple[int, int], int] = {}
        for (_, s), coefficient in value.terms:
            terms[0, s] = terms.get((0, s), 0) + coefficient
        return Size.make(terms)
    if isinstance(value, tuple):
        return tuple(_single(item) for item in value)
    if isinstance(value, dict):
        return {key: _single(item) for key, item in value.items()}
    return value


def _agree(graph: OpGraph, dim: int, buffers: Mapping[str, torch.Tensor]) -> bool:
    """Whether the constant for many samples is that of one, repeated on ``dim``."""
    if any(node.target not in buffers for node in graph.of("buffer")):
        return False
    leaves = {node.name: buffers[node.target] for node in graph.of("buffer")}
    try:
        for batch, seq in SIZES:
            (many,) = run_graph(graph, leaves, torch.float32, (batch, seq))
            (one,) = run_graph(graph, leaves, torch.float32, (1, seq))
            if not torch.equal(many, torch.cat([one] * batch, dim)):
                return False
    except (RuntimeError, IndexError):
        return False  # sizes the constant cannot have
    return True
