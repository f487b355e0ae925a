"""Which tensors of a model's blocks must have one layout: what is handed from block to block, and shared parameters."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.graph.ir import ModelGraph


@dataclass(frozen=True, slots=True)
class Ties:
    """``boundary``: (kind, input node) and (kind, "out", index) to the name of the layout they share; ``parameters``:
    (kind, parameter node) to the tied tensor's name; ``first``: the kind that owns each tied tensor's memory."""

    boundary: dict[tuple[str, ...], str]
    parameters: dict[tuple[str, str], str]


def ties_of(model: ModelGraph) -> Ties:
    """The layouts that must agree between blocks."""
    parent: dict[tuple[str, ...], tuple[str, ...]] = {}

    def find(x: tuple[str, ...]) -> tuple[str, ...]:
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    for block in model.blocks:
        for node, source in block.inputs.items():
            if source.origin == "block":
                made = (model.blocks[source.block].kind, "out", str(source.index))
                parent[find((block.kind, node))] = find(made)
    roots = {x: find(x) for x in list(parent)}
    names = {root: f"boundary{index}" for index, root in enumerate(dict.fromkeys(roots.values()))}
    group_of = {name: group[0] for group in model.tied for name in group}
    parameters: dict[tuple[str, str], str] = {}
    for block in model.blocks:
        for parameter in model.kinds[block.kind].graph.of("parameter"):
            full = block.parameters[parameter.target]
            if full in group_of:
                parameters[block.kind, parameter.name] = f"tied {group_of[full]}"
    return Ties({x: names[root] for x, root in roots.items()}, parameters)
