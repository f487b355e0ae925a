"""Whether an in-place operator of a traced graph may be read as its out-of-place form."""

from __future__ import annotations

import torch


def is_safe_mutation(node: torch.fx.Node) -> bool:
    """Whether only ``node``'s own first argument sees the change that ``node`` makes to it.

    True when that tensor was made inside the graph and, after ``node``, no other name of its storage is read: then
    reading ``node``'s result wherever the tensor was read afterwards says the same.
    """
    target, changed = node.target, node.args[0]
    assert isinstance(target, torch._ops.OpOverload)
    first, *others = target._schema.arguments
    if any(argument.alias_info and argument.alias_info.is_write for argument in others):
        return False
    if not (first.alias_info and first.alias_info.is_write and isinstance(changed, torch.fx.Node)):
        return False
    root = changed
    while (source := _viewed(root)) is not None:
        root = source
    if root.op != "call_function" or not isinstance(root.target, torch._ops.OpOverload):
        return False
    places = {other: place for place, other in enumerate(node.graph.nodes)}
    family = {root}
    for other in places:
        if other is not node and places[other] < places[node] and _viewed(other) in family:
            family.add(other)
    return not any(
        places[user] > places[node] and user.op != "output"
        for member in family - {changed}
        for user in member.users
        if user not in family
    )


def _viewed(node: torch.fx.Node) -> torch.fx.Node | None:
    """The tensor whose storage ``node`` may share; in-place operators return their first argument."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    returns = node.target._schema.returns
    shares = bool(returns) and returns[0].alias_info is not None
    source = node.args[0] if node.args else None
    return source if shares and isinstance(source, torch.fx.Node) else None
