"""In-place operators out of place: the new value of a tensor of which a view was changed."""

from __future__ import annotations

from typing import Any

import torch

from autopar.graph.draft import Draft
from autopar.graph.ir import Ref
from autopar.graph.simplify import bound


def written_back(view: torch.fx.Node, args: tuple[Any, ...], value: Ref, draft: Draft) -> Ref | None:
    """The value of the tensor that ``view`` is of, once the view holds ``value``; ``args``: the view's, imported.

    None for a view that cannot be written through (it steps over elements).
    """
    assert isinstance(view.target, torch._ops.OpOverload)
    name = view.target._schema.name.removeprefix("aten::")
    base: Ref = args[0]
    shape = draft.shape(base)
    if view.target._schema.is_mutable or name in ("alias", "detach"):
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
        back = tuple(order.index(dim) for dim in range(len(shape)))
        return Ref(draft.emit("aten.permute", value, back, shape=shape))
    if name in ("slice", "narrow", "select"):
        dim = (args[1] if len(args) > 1 else 0) % len(shape)
        given = args[2] if len(args) > 2 else None
        start = bound(0 if given is None else given, shape[dim])
        if name == "slice":
            stop = bound(shape[dim] if len(args) < 4 or args[3] is None else args[3], shape[dim])
            if len(args) > 4 and args[4] != 1:
                return None
        else:
            stop = start + (1 if name == "select" else args[3])
        if name == "select":
            value = draft.unsqueeze(value, dim)
        before = draft.slice(base, dim, 0, start) if start != 0 else None
        after = draft.slice(base, dim, stop, shape[dim]) if stop != shape[dim] else None
        parts = tuple(part for part in (before, value, after) if part is not None)
        return value if len(parts) == 1 else Ref(draft.emit("aten.cat", parts, dim, shape=shape))
    return None
