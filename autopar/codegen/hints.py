"""Names that a person would give to values: after what they are for, or the module that made them."""

from __future__ import annotations

import re

from autopar.codegen.source import values_in
from autopar.codegen.statements import Step
from autopar.codegen.wiring import is_writable
from autopar.graph.ir import OpGraph


def attention_names(graph: OpGraph) -> dict[str, str]:
    """q, k and v for the slices of one tensor that attention reads, back through views and rotations."""
    names: dict[str, str] = {}
    users = graph.users()
    for node in graph.of("op"):
        if node.op != "aten.scaled_dot_product_attention":
            continue
        for letter, name in zip("qkv", node.operands(), strict=False):
            here = graph.nodes[name]
            while here.kind == "op" and len(users[here.name]) == 1 and here.op not in ("aten.select", "aten.slice"):
                here = graph.nodes[here.operands()[0]]
            if here.kind == "op" and here.op in ("aten.select", "aten.slice"):
                names[here.name] = letter
    return names


def logits_names(graph: OpGraph) -> dict[str, str]:
    """What cross-entropy reads first is called logits, whatever module made it."""
    losses = (node for node in graph.of("op") if node.op == "autopar.cross_entropy")
    return {node.operands()[0]: "logits" for node in losses if graph.nodes[node.operands()[0]].kind == "op"}


def module_name(module: str) -> str:
    """The last part of a module path that is no number, as a name; "" if it has none."""
    parts = [part for part in module.split(".") if part and not part.isdigit()]
    if not parts:
        return ""
    name = re.sub(r"(?<!^c)(_proj|_layernorm|_layer_norm)$", "", parts[-1])
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()  # SelfAttention is no name for a variable
    return name if is_writable(name) else ""


def query_first(graph: OpGraph, steps: list[Step]) -> list[Step]:
    """The steps, with the views right above each attention in the order in which it reads them: q, k, v."""
    steps = list(steps)
    for node in graph.of("op"):
        if node.op != "aten.scaled_dot_product_attention":
            continue
        end = next(place for place, step in enumerate(steps) if step.key == f"op {node.name}")
        begin = end
        while begin and steps[begin - 1].group == "shape":
            begin -= 1
        views = {step.key: step for step in steps[begin:end]}
        feeds: dict[str, set[int]] = {key: set() for key in views}
        for place, key in enumerate(values_in(steps[end].expr)):
            pending = [key]
            while pending:
                key = pending.pop()
                if key in views:
                    feeds[key].add(place)
                    pending += values_in(views[key].expr)
        # What several read comes first, what none reads last; else the order stays.
        order = {key: -1 if len(places) > 1 else min(places, default=3) for key, places in feeds.items()}
        steps[begin:end] = sorted(views.values(), key=lambda step: order[step.key])
    return steps
