"""Operators that state their own types under `typecheck`: the few whose global meaning the checker does not know.

A dim split in blocks (a fused q/k/v projection split by heads) is for the checker a plain split of the same dim with
its elements in another order: `Boundaries` follows such tensors from where the order changes to where it changes back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autopar.codegen.runtime.operators import (
    Axes,
    context_attention,
    cross_entropy,
    drawn,
    vocab_cross_entropy,
    vocab_embedding,
)
from autopar.codegen.runtime.ring import ring_attention
from autopar.codegen.tensor_types import is_split, stated, types_of, with_types


def _fail(what: str) -> None:
    import spmd_types

    raise spmd_types.SpmdTypeError(what)


def _embedding_types(ids: Tensor, weight: Tensor, vocabulary_axes: tuple[Any, ...] = ()) -> dict[Any, Any]:
    from spmd_types import I, P, R, S

    known, table = types_of(ids), types_of(weight)
    result: dict[Any, Any] = {}
    # Axes that split one dim of the result are in the order of the operand that they split.
    splits = [axis for types in (known, table) for axis, kind in types.items() if is_split(kind)]
    for axis in dict.fromkeys([*splits, *known, *table]):
        kind, other = table.get(axis, R), known.get(axis, R)
        if axis in vocabulary_axes:
            if kind != S(0) or other is not R:
                _fail(f"vocab_embedding of ids {other} by a table {kind}: it must be R and S(0)")
            result[axis] = P
        elif is_split(other):
            # A frozen table has no gradient to add up: it may be read as it is.
            if kind is not R and (kind is not I or weight.requires_grad):
                _fail(f"embedding of split ids ({other}) by a table {kind}: it must be R")
            result[axis] = other
        elif kind == S(1):
            result[axis] = S(ids.ndim)
        elif kind == S(0):
            _fail("embedding by a table split by rows: use vocab_embedding")
        else:
            result[axis] = kind
    return result


def _embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    return stated(F.embedding, _embedding_types(ids, weight), ids, weight, padding_idx)


def _vocab_embedding(
    ids: Tensor, weight: Tensor, axis: Axes, padding_idx: int | None = None, vocabulary: int | None = None
) -> Tensor:
    types = _embedding_types(ids, weight, _axes(axis))
    return stated(vocab_embedding, types, ids, weight, axis, padding_idx, vocabulary)


def _axes(axis: Axes) -> tuple[Any, ...]:
    from spmd_types import normalize_axis

    return tuple(normalize_axis(each.get_group()) for each in (axis if isinstance(axis, tuple) else (axis,)))


def _loss_types(logits: Tensor, labels: Tensor, vocabulary_axes: tuple[Any, ...] = ()) -> dict[Any, Any]:
    from spmd_types import I, P, R, S

    other, classes = types_of(labels), S(logits.ndim - 1)
    result: dict[Any, Any] = {}
    for axis, kind in types_of(logits).items():
        if axis in vocabulary_axes:
            if kind != classes or is_split(other.get(axis, R)):
                _fail(f"vocab_cross_entropy of logits {kind} and labels {other.get(axis)}")
            result[axis] = I
        elif is_split(kind):
            if kind == classes or other.get(axis) != kind:
                _fail(f"cross_entropy of logits {kind} and labels {other.get(axis)}: both must be split by target")
            result[axis] = P
        elif kind is P:
            _fail("cross_entropy of partial logits")
        else:
            result[axis] = kind
    return result


def _cross_entropy(logits: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    return stated(cross_entropy, _loss_types(logits, labels), logits, labels, ignore)


def _drawn(x: Tensor, kind: str, axis: Axes = ()) -> Tensor:
    """Ranks that hold the same part of ``x`` draw the same; the sum of parts has no such numbers."""
    types = types_of(x)
    if unlike := [str(kind) for kind in types.values() if str(kind) == "P"]:
        _fail(f"numbers drawn in the shape of a tensor that is {unlike[0]}")
    return stated(drawn, types, x, kind)


def _vocab_cross_entropy(
    logits: Tensor, labels: Tensor, axis: Axes, ignore: int = -100, vocabulary: int | None = None
) -> Tensor:
    types = _loss_types(logits, labels, _axes(axis))
    return stated(vocab_cross_entropy, types, logits, labels, axis, ignore, vocabulary)


def _attention_types(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    by_position: tuple[Any, ...] | None,
    mask: Tensor | None = None,
    ring: tuple[Any, ...] = (),
) -> dict[Any, Any]:
    """``by_position``: the axes on which queries may be split by position; None: all; ``ring``: that on which they are,
    and keys and values as well."""
    from spmd_types import P, R, S

    keys, values, result = types_of(key), types_of(value), types_of(query)
    masks = types_of(mask) if mask is not None else {}
    for axis, kind in result.items():
        pair = (keys.get(axis), values.get(axis))
        if axis in ring:
            allowed = kind == S(query.ndim - 2) and pair == (kind, kind)
        elif kind == S(query.ndim - 2):
            allowed = (by_position is None or axis in by_position) and pair == (R, R)
            allowed &= mask is None or masks.get(axis) == S(mask.ndim - 2)
        elif by_position and axis in by_position:
            allowed = False
        else:
            whole = pair == (kind, kind) or (kind == S(1) and pair == (R, R))
            allowed = kind is not P and whole and (not is_split(kind) or kind in (S(0), S(1)))
        if not allowed:
            _fail(f"attention of query {kind}, key {pair[0]} and value {pair[1]}")
    return result


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
    mask = rest[0] if rest else options.get("attn_mask")
    types = _attention_types(query, key, value, () if options.get("is_causal") else None, mask)
    return stated(F.scaled_dot_product_attention, types, query, key, value, *rest, **options)


def _context_attention(
    query: Tensor, key: Tensor, value: Tensor, axis: Axes, balanced: bool = False, **options: Any
) -> Tensor:
    types = _attention_types(query, key, value, _axes(axis))
    return stated(context_attention, types, query, key, value, axis, balanced, **options)


def _ring_attention(
    query: Tensor, key: Tensor, value: Tensor, axis: Axes, balanced: bool = False, **options: Any
) -> Tensor:
    types = _attention_types(query, key, value, () if options.get("is_causal") else None, ring=_axes(axis))
    return stated(ring_attention, types, query, key, value, axis, balanced, **options)


def _experts_types(tensors: tuple[Tensor | None, ...], transposed: bool, own: tuple[Any, ...]) -> dict[Any, Any]:
    """``own``: the axes over which the experts are split."""
    from spmd_types import I, P, R, S

    hidden, index, weights, up, down, *rest = (types_of(x) if x is not None else {} for x in tensors)
    up_bias, down_bias, values, values_bias = rest
    rows, inner, result = (S(2), S(1), {}) if transposed else (S(1), S(2), {})
    for axis, kind in hidden.items():
        matrices = up.get(axis, R), down.get(axis, R)
        chosen = index.get(axis, R), weights.get(axis, R)
        apart = values.get(axis, matrices[0]) == matrices[0]
        if axis in own:
            allowed = kind is R and chosen[1] is R and matrices == (S(0), S(0))
            allowed &= all(bias.get(axis, S(0)) == S(0) for bias in (up_bias, down_bias, values_bias))
            result[axis] = P
        elif is_split(matrices[0]):
            allowed = kind is R and chosen[1] is R and matrices == (rows, inner)
            allowed &= up_bias.get(axis, S(1)) == S(1) == values_bias.get(axis, S(1)) and down_bias.get(axis, P) is P
            result[axis] = P
        elif is_split(kind):
            allowed = kind.dim < tensors[0].ndim - 1 and chosen == (kind, kind) and matrices == (R, R)  # type: ignore[union-attr]
            result[axis] = kind
        else:
            allowed = kind in (R, I) and chosen[1] is kind and matrices == (kind, kind)
            result[axis] = kind
        if not (allowed and apart):
            _fail(f"experts of {kind}, chosen {chosen[0]} with weights {chosen[1]}, by {matrices[0]} and {matrices[1]}")
    return result


def _experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    values: Tensor | None = None,
    values_bias: Tensor | None = None,
    *,
    transposed: bool = False,
    axis: Axes | None = None,
    **options: Any,
) -> Tensor:
    tensors = (hidden, index, weights, up, down, up_bias, down_bias, values, values_bias)
    types = _experts_types(tensors, transposed, () if axis is None else _axes(axis))
    return stated(_Mixed.apply, types, *tensors)


class _Mixed(torch.autograd.Function):
    """The result's shape and the gradients' shapes: which rows an expert computes is not known here."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Tensor:
        ctx.shapes = [(x.shape, x.dtype) if x is not None and x.is_floating_point() else None for x in tensors]
        assert tensors[0] is not None
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return tuple(gradient.new_zeros(made[0], dtype=made[1]) if made else None for made in ctx.shapes)


def _blocked_dim(x: Tensor) -> int:
    """The dim of ``x`` whose elements are, for the checker, in another order; -1 if there is none."""
    return getattr(x, "blocked_dim", -1)


class Boundaries(TorchFunctionMode):
    """Operators that state their own types, and dims that are split in blocks."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        import spmd_types

        kwargs = kwargs or {}
        if not spmd_types.is_type_checking():
            return func(*args, **kwargs)
        if func is F.embedding:
            return _embedding(*args)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is Tensor.flatten and self._is_inner_split(*args):
            return self._merge(*args)
        place = {Tensor.unflatten: 1, Tensor.chunk: 2}.get(func)
        if place is not None and len(args) > place and _blocked_dim(args[0]) == args[place]:
            return self._separate(func, *args)
        if func is F.linear and len(args) == 3:
            # A partial bias is added to the partial product, which the checker takes in two steps only.
            result = F.linear(*args[:2]) + args[2]
        else:
            result = func(*args, **kwargs)
        if func is F.linear and _blocked_dim(args[1]) == 0:
            result.blocked_dim = result.ndim - 1
        return result

    def _is_inner_split(self, x: Tensor, start: int, end: int) -> bool:
        """Whether a dim that `flatten` merges is split, but is not the outermost of them."""
        split = [kind.dim for kind in types_of(x).values() if is_split(kind)]
        return any(start < dim <= end for dim in split)

    def _merge(self, x: Tensor, start: int, end: int) -> Tensor:
        from spmd_types import S

        types = types_of(x)
        for axis, kind in types.items():
            if is_split(kind) and kind.dim > start:
                types[axis] = S(max(start, kind.dim - (end - start)))
        result = stated(Tensor.flatten, types, x, start, end)
        result.blocked_dim = start  # type: ignore[attr-defined]
        return result

    def _separate(self, func: Callable[..., Any], x: Tensor, *arguments: Any) -> Any:
        """Undo `_merge`: the parts of the dim, each split, as a dim of their own or as a list."""
        import spmd_types
        from spmd_types import S

        types, dim = types_of(x), _blocked_dim(x)
        if func is Tensor.unflatten:
            # The free size is that of the part which is split.
            added, place = len(arguments[1]) - 1, arguments[1].index(-1)
            for axis, kind in types.items():
                if is_split(kind) and kind.dim >= dim:
                    types[axis] = S(kind.dim + (place if kind.dim == dim else added))
            result = stated(func, types, x, *arguments)
            if place == 0:
                result.blocked_dim = dim  # type: ignore[attr-defined]
            return result
        with spmd_types.no_typecheck():
            parts = func(x, *arguments)
        return tuple(with_types(part, types) for part in parts)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "vocab_embedding": _vocab_embedding,
    "vocab_cross_entropy": _vocab_cross_entropy,
    "cross_entropy": _cross_entropy,
    "drawn": _drawn,
    "context_attention": _context_attention,
    "ring_attention": _ring_attention,
    "experts": _experts,
}
"""For each function of `runtime.operators` and `runtime.experts` that needs it, the one that states its types."""
