"""What an in-place operator of a traced graph changes: a tensor made in the graph, and the views of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

_NAMES = "slice select narrow unsqueeze squeeze view transpose t permute alias detach contiguous"
VIEWS = frozenset(_NAMES.split())
"""Operators through which a change can be written back: they always make views (`reshape` and `to` may copy), or it is
told from the tensor whether they do (`contiguous`)."""


@dataclass(frozen=True, slots=True)
class Change:
    """What an in-place operator changes.

    ``way``: from the tensor that owns the storage to the one the operator names, each a view of the one before it.
    ``views``: the other views of that storage that are read later, in order. Only the named tensor is in ``way``, and
    nothing in ``views``, where no other name of its storage is read later.
    """

    way: tuple[torch.fx.Node, ...]
    views: tuple[torch.fx.Node, ...]


def change_of(node: torch.fx.Node, given: Callable[[torch.fx.Node], bool]) -> Change | None:
    """What in-place operator ``node`` changes; None if that is not only a tensor that the graph itself made or was
    ``given`` with a batch, or views of it that may be copies."""
    target, changed = node.target, node.args[0]
    assert isinstance(target, torch._ops.OpOverload)
    first, *others = target._schema.arguments
    if any(argument.alias_info and argument.alias_info.is_write for argument in others):
        return None
    if not (first.alias_info and first.alias_info.is_write and isinstance(changed, torch.fx.Node)):
        return None
    way = [changed]
    while (source := _viewed(way[0])) is not None:
        way.insert(0, source)
    made = isinstance(way[0].target, torch._ops.OpOverload) or _new_item(way[0])
    if not (made if way[0].op == "call_function" else given(way[0])):
        return None
    places = {other: place for place, other in enumerate(node.graph.nodes)}
    family = dict.fromkeys(way[:1])
    for other in places:
        if other is not node and places[other] < places[node] and _viewed(other) in family:
            family[other] = None

    def readers(member: torch.fx.Node) -> Iterator[torch.fx.Node]:
        return (user for user in member.users if places[user] > places[node] and user.op != "output")

    if not any(user not in family for member in family if member is not changed for user in readers(member)):
        return Change((changed,), ())
    if not all(_writable(member) for member in (*way[1:], *(m for m in family if m not in way))):
        return None
    return Change(tuple(way), tuple(member for member in family if member not in way))


def _writable(view: torch.fx.Node) -> bool:
    assert isinstance(view.target, torch._ops.OpOverload)
    schema = view.target._schema
    return schema.is_mutable or schema.name.removeprefix("aten::") in VIEWS


def _new_item(node: torch.fx.Node) -> bool:
    """Whether ``node`` is one of several tensors that an operator made anew (those of a split are views)."""
    source = node.args[0] if node.target is operator.getitem else None
    if not isinstance(source, torch.fx.Node) or not isinstance(source.target, torch._ops.OpOverload):
        return False
    return all(returned.alias_info is None for returned in source.target._schema.returns)


def _viewed(node: torch.fx.Node) -> torch.fx.Node | None:
    """The tensor whose storage ``node`` may share; in-place operators return their first argument."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    returns = node.target._schema.returns
    shares = bool(returns) and returns[0].alias_info is not None
    source = node.args[0] if node.args else None
    if not shares or not isinstance(source, torch.fx.Node):
        return None
    return None if _copies(node, source) else source


def _copies(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    """Whether an operator that may make a view made a copy, as is told from what it was given."""
    name = node.target._schema.name  # type: ignore[union-attr]
    given, made = source.meta.get("val"), node.meta.get("val")
    if not isinstance(given, torch.Tensor) or not isinstance(made, torch.Tensor):
        return False
    return (name == "aten::contiguous" and not given.is_contiguous()) or (
        name == "aten::to" and given.dtype != made.dtype
    )
