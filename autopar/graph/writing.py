"""In-place operators out of place: the new value of a tensor of which a view was changed."""

from __future__ import annotations

from typing import Any

import torch

from autopar.graph.draft import Draft
from autopar.graph.ir import Ref
from autopar.graph.simplify import bound


def written_back(view: torch.fx.Node, args: tuple[Any, ...], value: Ref, draft: Draft) -> Ref | None:
    """The value of the tensor that ``view`` is of, once the view holds ``value``; ``args``: the view's, imported.

    None for a view that cannot be written through.
    """
    assert isinstance(view.target, torch._ops.OpOverload)
    name = view.target._schema.name.removeprefix("aten::")
    base: Ref = args[0]
    shape = draft.shape(base)
    if view.target._schema.is_mutable or name in ("alias", "detach", "contiguous"):
        return value
    if draft.shape(value) == shape and name in ("view", "slice", "narrow"):
        return value
    if name in ("view", "squeeze", "unsqueeze"):
        return Ref(draft.emit("aten.reshape", value, shape, shape=shape))
    if name == "t":
        return draft.transpose(value, 0, 1) if len(shape) == 2 else value
    if name == "transpose":
        return draft.transpose(value, args[1] % len(shape), args[2] % len(shape))
    if name == "permute":
        order = [dim % len(shape) for dim in args[1]]
        return draft.permute(value, [order.index(dim) for dim in range(len(shape))])
    if name in ("slice", "narrow", "select"):
        dim = (args[1] if len(args) > 1 else 0) % len(shape)
        given = args[2] if len(args) > 2 else None
        start = bound(0 if given is None else given, shape[dim])
        if name == "slice":
            stop = bound(shape[dim] if len(args) < 4 or args[3] is None else args[3], shape[dim])
            if len(args) > 4 and args[4] != 1:
                return _stepped(base, dim, (start, stop, args[4]), value, draft)
        else:
            stop = start + (1 if name == "select" else args[3])
        if name == "select":
            value = draft.unsqueeze(value, dim)
        before = draft.slice(base, dim, 0, start) if start != 0 else None
        after = draft.slice(base, dim, stop, shape[dim]) if stop != shape[dim] else None
        parts = tuple(part for part in (before, value, after) if part is not None)
        return value if len(parts) == 1 else Ref(draft.emit("aten.cat", parts, dim, shape=shape))
    return None


def _stepped(base: Ref, dim: int, places: tuple[Any, Any, Any], value: Ref, draft: Draft) -> Ref | None:
    """``base`` with ``value`` at every ``step``-th place from ``start`` on: blocks of a step, of which each begins with
    one of ``value``; the last may be cut off by the end of the dim."""
    size, (start, stop, step) = draft.shape(base)[dim], places
    if not all(isinstance(number, int) for number in (size, start, stop, step)):
        return None
    count = -(-(stop - start) // step)
    whole = count if start + count * step <= size else count - 1
    parts = [draft.slice(base, dim, 0, start)] if start else []
    if whole:
        blocks = draft.unflatten(draft.slice(base, dim, start, start + whole * step), dim, (whole, step))
        firsts = draft.unsqueeze(draft.slice(value, dim, 0, whole), dim + 1)
        shape = draft.shape(blocks)
        joined = draft.emit("aten.cat", (firsts, draft.slice(blocks, dim + 1, 1, step)), dim + 1, shape=shape)
        parts.append(draft.flatten(Ref(joined), dim, dim + 1))
    rest = start + whole * step
    if whole < count:
        parts.append(draft.slice(value, dim, whole, count))
        rest += 1
    if rest < size:
        parts.append(draft.slice(base, dim, rest, size))
    return parts[0] if len(parts) == 1 else Ref(draft.emit("aten.cat", tuple(parts), dim, shape=draft.shape(base)))
