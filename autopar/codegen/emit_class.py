"""The class of a block: its parameters under the names they have in the block, and its forward."""

from __future__ import annotations

import re
from collections.abc import Iterable

from autopar.codegen.buffers import buffer_expr
from autopar.codegen.emit_block import Body
from autopar.codegen.members import assignment, attribute, tree
from autopar.codegen.setting import Setting
from autopar.codegen.source import Expr, Method, Text
from autopar.codegen.wiring import Placed, argument_names, free_name
from autopar.graph.dispatch import expert_parameters
from autopar.graph.ir import ModelGraph
from autopar.sharding.layout import Layout


def class_source(placed: Placed, model: ModelGraph, setting: Setting) -> list[str]:
    """A block class: parameters under the names they have in the block, and the forward on this rank's part."""
    kind = model.kinds[placed.kind]
    targets = {node.target: node.name for node in kind.graph.of("parameter")}
    stored = {t: stored_layout(placed.candidate.decision.inputs[name], setting) for t, name in targets.items()}
    metas = {t: kind.graph.nodes[name].meta for t, name in targets.items()}
    arguments = argument_names(kind, flow_arguments(placed, model))
    axes = axis_names(setting, (target.partition(".")[0] for target in targets))
    forward = block_body(placed, model, setting, arguments, axes).program().lines(2)
    lines = [f"class {placed.callee}(nn.Module):", *_docstring(placed, model, setting, arguments), ""]
    lines += ["    def __init__(self, new: New) -> None:", "        super().__init__()"]
    lines += axis_assignments(axes, forward)
    shared = {node.target for node in expert_parameters(kind.graph)} if setting.ep > 1 else set()
    for name, member in tree(stored, metas, setting.axes, shared, setting.ep).items():
        lines += assignment(name, member, 2)
    lines += ["", *signature("forward", list(arguments.values()), [], len(kind.graph.outputs), 1), *forward]
    return lines


def signature(
    name: str, arguments: list[str], keywords: list[str], outputs: int, indent: int, optional: bool = False
) -> list[str]:
    """``def name(self, ...)`` on tensors, on one line or one argument a line."""
    margin = "    " * indent
    kind = "Tensor" if outputs == 1 else "tuple[" + ", ".join(["Tensor"] * outputs) + "]"
    annotation = "Tensor | None = None" if optional else "Tensor"
    parts = ["self", *(f"{argument}: {annotation}" for argument in arguments)]
    parts += ["*", *(f"{a}: Tensor" for a in keywords)] if keywords else []
    line = f"{margin}def {name}({', '.join(parts)}) -> {kind}:"
    if len(line) <= 88:
        return [line]
    return [f"{margin}def {name}(", *(f"{margin}    {part}," for part in parts), f"{margin}) -> {kind}:"]


def flow_arguments(placed: Placed, model: ModelGraph) -> dict[str, str]:
    """For a block's input nodes, the names of what the stage passes."""
    block = model.blocks[placed.index]
    return dict(zip(block.inputs, placed.arguments, strict=True))


def block_body(
    placed: Placed,
    model: ModelGraph,
    setting: Setting,
    arguments: dict[str, str],
    axes: dict[str, str],
    names: dict[str, str] | None = None,
) -> Body:
    """The forward of a block. ``axes``: what ``self`` calls the model axes; ``names``: of its parameters, where they
    are members of ``self`` under another name than in the block."""
    kind = model.kinds[placed.kind]
    weights: dict[str, Expr] = {}
    shared = list(expert_parameters(kind.graph))
    for node in kind.graph.nodes.values():
        if node.kind == "parameter":
            path = attribute("self", (names or {}).get(node.target, node.target), parameter=True)
            split = setting.splits or (setting.ep > 1 and node in shared)
            weights[node.name] = Method(Text(path), "to_local") if split else Text(path)
        elif node.kind == "buffer":
            full = model.blocks[placed.index].parameters[node.target]
            weights[node.name] = buffer_expr(full, node.meta, model.buffer_values.get(full), setting.double)
    texts = {axis: f"self.{name}" for axis, name in axes.items()}
    return Body(kind.graph, placed.candidate.decision, setting, arguments, weights, texts, path=placed.path)


def axis_names(setting: Setting, members: Iterable[str]) -> dict[str, str]:
    """What a class with these members calls the model axes."""
    taken = set(members)
    return {axis: free_name(axis, taken) for axis in (*setting.axes, *(("ep",) if setting.ep > 1 else ()))}


def axis_assignments(names: dict[str, str], lines: Iterable[str]) -> list[str]:
    """``self.tp = new.axis("tp")`` for the axes that ``lines`` read."""
    text = "\n".join(lines)
    read = {axis: name for axis, name in names.items() if re.search(rf"\bself\.{name}\b", text)}
    return [f'        self.{name} = new.axis("{axis}")' for axis, name in read.items()]


def stored_layout(layout: Layout, setting: Setting) -> Layout:
    """``layout`` on the axes there are."""
    return Layout(tuple((axis, kind) for axis, kind in layout.types if axis in setting.axes))


def _docstring(placed: Placed, model: ModelGraph, setting: Setting, arguments: dict[str, str]) -> list[str]:
    graph, decision = model.kinds[placed.kind].graph, placed.candidate.decision
    where = f"{placed.path.rpartition('.')[0]}.*" if placed.container else placed.path
    lines = [f'    """{where}, one micro-batch.' if where else f'    """{placed.kind}, one micro-batch.']
    if setting.axes:
        lines.append("")
        for name, argument in arguments.items():
            if graph.nodes[name].meta.requires_grad:
                lines.append(f"    {argument}: arrives as {stored_layout(decision.inputs[name], setting)}")
        for name in graph.outputs:
            lines.append(f"    returns {stored_layout(decision.outputs[name], setting)}")
    candidate = placed.candidate
    if candidate.forward_s > 0:
        times = f"{candidate.forward_s * 1e3:.3g} ms forward, {candidate.backward_s * 1e3:.3g} ms backward"
        lines += ([""] if not setting.axes else []) + [f"    predicted: {times}"]
    if len(lines) == 1:
        return [lines[0] + '"""']
    return [*lines, '    """']
