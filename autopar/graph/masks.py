"""Constant attention masks recognised by their values: causal ones become ``is_causal``, those that allow all go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from autopar.graph.draft import Draft, Rule
from autopar.graph.interpret import run_graph
from autopar.graph.ir import Node, OpGraph, Ref

SMALL = ((1, 2), (2, 5), (3, 8))
LARGEST = 16384
"""Masks are evaluated at a few small sizes, and at one just beyond each number they compare positions with."""


def rules(values: dict[str, torch.Tensor], nominal: int | None, limits: set[int]) -> dict[str, list[Rule]]:
    """The mask rule. ``values``: buffers known by full name; ``nominal``: the longest sequence that the model's config
    speaks of. A mask that changes only beyond it is taken for what it is up to there; how long it stays that is added
    to ``limits``."""

    def mask(node: Node, new: Draft) -> Ref | None:
        ref = node.kwargs.get("attn_mask")
        if not isinstance(ref, Ref) or ref.name not in new.constant or node.kwargs.get("is_causal"):
            return None
        shape = new.shape(ref)
        queries, keys = new.shape(node.args[0])[-2], new.shape(node.args[1])[-2]
        kind = _kind(constant_graph(new, ref.name), values, nominal, limits)
        if kind is None or (kind == "causal" and (shape[-2:] != (queries, keys) or queries != keys)):
            return None
        options = {key: value for key, value in node.kwargs.items() if key != "attn_mask"}
        if kind == "causal":
            options["is_causal"] = True
        return Ref(new.emit(node.op, *node.args, shape=node.meta.shape, options=options))

    def always(node: Node, new: Draft) -> Ref | None:
        """``where(True, x, y)`` and ``True & x`` are ``x``."""
        operands = node.args[:2] if node.op == "aten.where" else node.args
        for condition, kept in (operands,) if node.op == "aten.where" else (operands, operands[::-1]):
            if not (isinstance(condition, Ref) and isinstance(kept, Ref) and condition.name in new.constant):
                continue
            if new.meta(condition).dtype != "bool" or new.meta(kept).dtype != node.meta.dtype:
                continue
            if _kind(constant_graph(new, condition.name), values, nominal, limits) == "full":
                if new.shape(kept) == node.meta.shape:
                    return kept
                return new.expand(kept, node.meta.shape)
        return None

    return {
        "aten.scaled_dot_product_attention": [mask],
        **{f"aten.{name}": [always] for name in ("where", "logical_and", "bitwise_and")},
    }


def constant_graph(draft: Draft, *outputs: str) -> OpGraph:
    """The part of ``draft`` that computes ``outputs``."""
    needed = set(outputs)
    for node in reversed(draft.nodes.values()):
        if node.name in needed:
            needed.update(node.operands())
    return OpGraph({name: node for name, node in draft.nodes.items() if name in needed}, outputs)


def _kind(graph: OpGraph, buffers: dict[str, torch.Tensor], nominal: int | None, limits: set[int]) -> str | None:
    """ "causal", "full", or None for anything else or unknown."""
    leaves: dict[str, torch.Tensor] = {}
    for node in graph.of("buffer"):
        if node.target not in buffers:
            return None
        leaves[node.name] = buffers[node.target]
    # A window or chunk of n positions shows only beyond n: look there too, unless no sequence gets that long.
    numbers = {abs(n) for node in graph.of("op") for n in _integers((node.args, node.kwargs)) if abs(n) > 6}
    beyond = {n for n in numbers if nominal is not None and n + 1 > nominal}
    edges = {n + 2 for n in numbers - beyond}
    if any(edge > LARGEST for edge in edges):
        return None
    kinds = {_kind_at(graph, leaves, batch, seq) for batch, seq in (*SMALL, *((1, edge) for edge in sorted(edges)))}
    if len(kinds) != 1 or None in kinds:
        return None
    limits |= {n for n in beyond if n < 2**31}  # others are open ends of slices
    return kinds.pop()


def _kind_at(graph: OpGraph, leaves: dict[str, torch.Tensor], batch: int, seq: int) -> str | None:
    try:
        (mask,) = run_graph(graph, leaves, torch.float32, (batch, seq))
    except (RuntimeError, IndexError):
        return None  # sizes the mask cannot have
    allowed = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((allowed | (mask <= -1e4)).all()):
        return None  # a bias, not a mask
    if bool(allowed.all()):
        return "full"
    if mask.ndim < 2 or mask.shape[-2] != mask.shape[-1]:
        return None
    return "causal" if bool((allowed == torch.ones(mask.shape[-2:], dtype=torch.bool).tril()).all()) else None


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, dict):
        yield from _integers(tuple(value.values()))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value
