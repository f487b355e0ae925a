"""Makes a chain of segments: each reads batch data, shared constants, and what the segment before it hands over.

What depends on batch data alone (a mask) is computed again where it is read. Parameters that layers read and do not own
are handed on by the first segment (`lend`). Everything else that is needed further
down (an encoder's output, a position bias) is handed on by the segments in between.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from autopar.graph.draft import RANDOM, Draft, live
from autopar.graph.ir import Node, Ref, map_refs
from autopar.graph.structure import layer_of


@dataclass(slots=True)
class Segment:
    """A run of operators: ``path`` is the layer (with ``@k`` for repeated calls), "" for a piece between layers."""

    path: str
    nodes: list[str] = field(default_factory=list)

    @property
    def module(self) -> str:
        return re.sub(r"@\d+", "", self.path)

    @property
    def container(self) -> str:
        return self.path.rpartition(".")[0]


def sink(draft: Draft, segments: Sequence[Segment], shared: set[str]) -> tuple[Draft, list[Segment]]:
    """Copy what follows from batch data alone into every segment that reads it."""
    home = {name: index for index, segment in enumerate(segments) for name in segment.nodes}
    data = _from_data(draft, shared)
    copies: dict[str, list[Node]] = {}
    moved: list[Segment] = []
    changed: dict[str, Node] = {}
    for index, segment in enumerate(segments):
        names: dict[str, str] = {}
        wanted = {
            operand
            for name in segment.nodes
            for operand in draft.nodes[name].operands()
            if operand in data and home[operand] != index
        }
        for name in reversed(list(data)):
            if name in wanted:
                wanted.update(o for o in draft.nodes[name].operands() if o in data and home[o] != index)
        for name in data:
            if name in wanted:
                node = draft.nodes[name]
                names[name] = f"{name}_in_{index}"
                copies.setdefault(name, []).append(_renamed(node, names))
        for name in segment.nodes if names else ():
            changed[name] = _renamed(draft.nodes[name], names, name)
        moved.append(Segment(segment.path, [*names.values(), *segment.nodes]))
    sunk = Draft(output=draft.output, constant=set(draft.constant))
    for name, node in draft.nodes.items():
        sunk.nodes[name] = changed.get(name, node)
        sunk.nodes.update({copy.name: copy for copy in copies.get(name, ())})
    sunk = live(sunk)
    for segment in moved:
        segment.nodes = [name for name in segment.nodes if name in sunk.nodes]
    return sunk, [segment for segment in moved if segment.nodes]


def lend(draft: Draft, layers: Mapping[str, str]) -> Draft:
    """Parameters that are no layer's, but read in layers (a table of relative positions), are handed to them: as copies
    that are made outside of all layers, since a block holds parameters of its own only."""
    names: dict[str, str] = {}
    lent = Draft(output=draft.output, constant=set(draft.constant))
    for node in draft.nodes.values():
        inside = node.kind == "op" and layer_of(node.module, layers) is not None
        lent.nodes[node.name] = _renamed(node, names, node.name) if inside else node
        if node.kind == "parameter" and layer_of(node.target, layers) is None:
            names[node.name] = copy = f"{node.name}_lent"
            module = node.target.rpartition(".")[0]
            lent.nodes[copy] = Node(copy, "op", node.meta, "aten.clone", (Ref(node.name),), module=module)
    return live(lent)


def _renamed(node: Node, names: Mapping[str, str], name: str | None = None) -> Node:
    def rename(operand: str) -> str:
        return names.get(operand, operand)

    args, kwargs = map_refs(node.args, rename), map_refs(node.kwargs, rename)
    return replace(node, name=name or names[node.name], args=args, kwargs=kwargs)


def _from_data(draft: Draft, shared: set[str]) -> dict[str, None]:
    """Operators that depend on batch data, and on nothing but it and constants, in order."""
    found: dict[str, None] = {}
    for node in draft.nodes.values():
        if node.kind != "op" or node.op in RANDOM or node.name in shared:
            continue
        operands = [draft.nodes[name] for name in node.operands()]
        if all(o.name in found or o.name in shared or o.kind in ("input", "buffer") for o in operands):
            found[node.name] = None
    return found


def hand_on(
    segments: Sequence[Segment], wanted: Sequence[tuple[str, ...]], readers: Mapping[str, Sequence[int]]
) -> list[tuple[str, ...]]:
    """What each segment hands on beside its own outputs, in the order in which it gets it.

    ``wanted``: the outputs of each segment; ``readers``: for each of them the segments that read it, in order. The last
    layer of a container hands on what the one before it does, so that both stay the same.
    """
    carried: list[tuple[str, ...]] = [() for _ in segments]
    for index in range(1, len(segments)):
        for name in (*wanted[index - 1], *carried[index - 1]):
            last = max(readers.get(name, ()), default=index)
            alike = bool(segments[index].path) and segments[index].container == segments[index - 1].container
            if last > index or (last == index and alike and name in carried[index - 1]):
                carried[index] = (*carried[index], name)
    return carried
