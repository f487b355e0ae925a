"""In-place changes of the model's own tensors in its forward: counters and averages in buffers, clamped parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autopar.errors import UnsupportedError
from autopar.graph.draft import Draft, live
from autopar.graph.ir import Ref

if TYPE_CHECKING:
    from autopar.graph.importing import Importer

_CLAMPS = (torch.ops.aten.clamp_.default, torch.ops.aten.clamp_.Tensor)
_SAME = ("aten::detach", "aten::alias")


def state_of(node: torch.fx.Node, importer: Importer) -> torch.fx.Node | None:
    """The buffer, or the parameter that is clamped, all of which in-place operator ``node`` changes; else None."""
    root: Any = node.args[0]
    while isinstance(root, torch.fx.Node) and root.op == "call_function":
        if not isinstance(root.target, torch._ops.OpOverload):
            return None
        if not (root.target._schema.is_mutable or root.target._schema.name in _SAME):
            return None
        root = root.args[0]
    value = importer.values.get(root) if isinstance(root, torch.fx.Node) else None
    if not isinstance(value, Ref):
        return None
    leaf = importer.draft.nodes[value.name]
    clamped = leaf.kind == "parameter" and node.target in _CLAMPS and root in importer.outer
    return root if leaf.kind == "buffer" or clamped else None


def write_state(node: torch.fx.Node, root: torch.fx.Node, importer: Importer) -> None:
    """What becomes of the change: a buffer's is left out (it may not matter: `notes_of_state`); a parameter is clamped
    where it is read, and gets the whole gradient, as one that is clamped where it is stored."""
    draft, held = importer.draft, importer.values[root]
    leaf = draft.nodes[held.name]
    importer.changed[leaf.target] = leaf.kind
    if leaf.kind == "parameter":
        shape = draft.shape(held)
        moved = Ref(draft.emit("aten.sub", importer.values[node], held, shape=shape))
        moved = Ref(draft.emit("aten.detach", moved, shape=shape))
        importer.values[root] = Ref(draft.emit("aten.add", held, moved, shape=shape))


def notes_of_state(changed: dict[str, str], draft: Draft) -> tuple[str, ...]:
    """What to tell of ``changed`` parameters and buffers. Raises UnsupportedError where the loss depends on a buffer
    that does not stay what it was."""
    read = {node.target for node in live(draft).nodes.values() if node.kind == "buffer"}
    told = []
    for name, kind in changed.items():
        if name in read:
            raise UnsupportedError(
                f"the model changes buffer {name} in place, and its loss depends on it: emitted code keeps no state "
                "between steps; compute it out of place, or outside of forward"
            )
        if kind == "buffer":
            told.append(f"buffer {name}, which forward changes and the loss does not read, is left as it is")
        else:
            told.append(f"parameter {name}, which forward clamps in place, is clamped where it is read, not stored so")
    return tuple(told)
