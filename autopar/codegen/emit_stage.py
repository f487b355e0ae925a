"""The classes of ``module.py``: block classes with their parameters, and the stage that wires blocks together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from autopar.codegen.buffers import buffer_expr
from autopar.codegen.calls import MANNER, call, calls_by_manner, manner, remark
from autopar.codegen.emit_block import Body, Setting
from autopar.codegen.emit_constants import constants_arguments
from autopar.codegen.source import Argument, Call, Expr, Method, Text, literal, statement
from autopar.codegen.wiring import (
    Placed,
    argument_name,
    argument_names,
    blocks_method,
    flow_names,
    free_name,
    is_writable,
    top_names,
)
from autopar.errors import UnsupportedError
from autopar.graph.ir import ModelGraph, OpGraph
from autopar.plan import Plan
from autopar.sharding.layout import Layout


def class_source(placed: Placed, model: ModelGraph, setting: Setting) -> list[str]:
    """A block class: parameters under the names they have in the block, and the forward on this rank's part."""
    kind = model.kinds[placed.kind]
    targets = {node.target: node.name for node in kind.graph.of("parameter")}
    stored = {t: _stored(placed.candidate.decision.inputs[name], setting) for t, name in targets.items()}
    shapes = {t: kind.graph.nodes[name].meta.at(1, 1) for t, name in targets.items()}
    arguments = argument_names(kind, _flow_arguments(placed, model))
    body = _block_body(placed, model, setting, arguments, "self.", stored)
    axis = _axis_name(target.partition(".")[0] for target in targets)
    body.axis_text = f"self.{axis}"
    forward = body.program().lines(2)
    lines = [f"class {placed.callee}(nn.Module):", *_docstring(placed, model, setting, arguments), ""]
    lines += ["    def __init__(self, new: New) -> None:", "        super().__init__()"]
    if _uses(axis, forward):
        lines.append(f"        self.{axis} = new.axis")
    for name, member in _tree(stored, shapes).items():
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


def _flow_arguments(placed: Placed, model: ModelGraph) -> dict[str, str]:
    """For a block's input nodes, the names of what the stage passes."""
    block = model.blocks[placed.index]
    return dict(zip(block.inputs, placed.arguments, strict=True))


def _block_body(
    placed: Placed,
    model: ModelGraph,
    setting: Setting,
    arguments: dict[str, str],
    prefix: str,
    stored: dict[str, Layout],
    names: dict[str, str] | None = None,
) -> Body:
    kind = model.kinds[placed.kind]
    weights: dict[str, Expr] = {}
    for node in kind.graph.nodes.values():
        if node.kind == "parameter":
            path = attribute(prefix, (names or {}).get(node.target, node.target), parameter=True)
            weights[node.name] = Method(Text(path), "to_local") if setting.axes else Text(path)
        elif node.kind == "buffer":
            full = model.blocks[placed.index].parameters[node.target]
            weights[node.name] = buffer_expr(full, node.meta, model.buffer_values.get(full), setting.double)
    return Body(kind.graph, placed.candidate.decision, setting, arguments, weights)


def attribute(prefix: str, path: str, parameter: bool = False) -> str:
    """``self.a.b`` for the dotted path ``a.b`` of a module (or parameter), also where a part is no Python name."""
    text, odd = prefix.rstrip("."), ""
    parts = path.split(".")
    for place, part in enumerate(parts):
        if is_writable(part):
            text += f".{part}"
            continue
        odd += f".{part}" if odd else part
        last = place + 1 == len(parts)
        if last or is_writable(parts[place + 1]):
            text += f".{'get_parameter' if last and parameter else 'get_submodule'}({json.dumps(odd)})"
            odd = ""
    return text


def assignment(path: str, member: Expr, indent: int) -> list[str]:
    """``self.a.b = member``, also where the last part is no Python name."""
    owner, _, leaf = path.rpartition(".")
    if is_writable(leaf):
        return statement(f"{attribute('self', path)} = ", member, str, indent)
    is_parameter = isinstance(member, Call) and member.function.startswith("new.")
    register = "register_parameter" if is_parameter else "add_module"
    holder = Text(attribute("self", owner) if owner else "self")
    return statement("", Method(holder, register, (literal(leaf), member)), str, indent)


def _axis_name(members: Iterable[str]) -> str:
    """What a class with these members calls its tensor-parallel axis."""
    return free_name("tp", members)


def _uses(axis: str, lines: Iterable[str]) -> bool:
    return any(re.search(rf"\bself\.{axis}\b", line) for line in lines)


def _stored(layout: Layout, setting: Setting) -> Layout:
    return Layout(tuple((axis, kind) for axis, kind in layout.types if axis in setting.axes))


def parameter_expr(layout: Layout, shape: tuple[int, ...]) -> Expr:
    """``new.whole(shape)`` or ``new.split(dim, shape)``."""
    split = [kind.dim for _, kind in layout.types if kind.kind == "S"]
    if len(split) > 1:
        raise UnsupportedError(f"a parameter of shape {shape} is split over several model axes ({layout})")
    sizes = tuple(literal(size) for size in shape)
    return Call("new.split", (literal(split[0]), *sizes)) if split else Call("new.whole", sizes)


def _tree(stored: dict[str, Layout], shapes: dict[str, tuple[int, ...]]) -> dict[str, Expr]:
    """Top-level attributes of a block, nested as the model's modules are."""
    members: dict[str, Expr] = {}
    for head in dict.fromkeys(target.split(".")[0] for target in stored):
        targets = [target for target in stored if target.split(".")[0] == head]
        if targets == [head]:
            members[head] = parameter_expr(stored[head], shapes[head])
            continue
        inner = {t.split(".", 1)[1]: stored[t] for t in targets}
        members[head] = _weights(_tree(inner, {t.split(".", 1)[1]: shapes[t] for t in targets}))
    return members


def _weights(members: dict[str, Expr]) -> Expr:
    if all(is_writable(name) for name in members):
        arguments: tuple[Argument, ...] = tuple(members.items())
        return Call("Weights", arguments)
    return Call("Weights.named", tuple(Call("", (literal(name), member)) for name, member in members.items()))


def _docstring(placed: Placed, model: ModelGraph, setting: Setting, arguments: dict[str, str]) -> list[str]:
    graph, decision = model.kinds[placed.kind].graph, placed.candidate.decision
    where = f"{placed.path.rpartition('.')[0]}.*" if placed.container else placed.path
    lines = [f'    """{where}, one micro-batch.' if where else f'    """{placed.kind}, one micro-batch.']
    if setting.axes:
        lines.append("")
        for name, argument in arguments.items():
            if graph.nodes[name].meta.requires_grad:
                lines.append(f"    {argument}: arrives as {_stored(decision.inputs[name], setting)}")
        for name in graph.outputs:
            lines.append(f"    returns {_stored(decision.outputs[name], setting)}")
    candidate = placed.candidate
    if candidate.forward_s > 0:
        times = f"{candidate.forward_s * 1e3:.3g} ms forward, {candidate.backward_s * 1e3:.3g} ms backward"
        lines += ([""] if not setting.axes else []) + [f"    predicted: {times}"]
    if len(lines) == 1:
        return [lines[0] + '"""']
    return [*lines, '    """']


@dataclass(frozen=True, slots=True)
class StageWriter:
    """Writes ``STAGES`` and the class ``Stage``."""

    plan: Plan
    model: ModelGraph
    placed: tuple[Placed, ...]
    setting: Setting

    @property
    def many(self) -> bool:
        return len(self.plan.stages) > 1

    @property
    def _axis(self) -> str:
        return _axis_name(top_names(self.model))

    @property
    def _index(self) -> str:
        return free_name("index", top_names(self.model))

    def stages_table(self) -> list[str]:
        """Per stage its runs of equal blocks: where they are, which, of what class, recomputed or not."""
        lines = [f"# Per stage, runs of equal blocks: module list, positions, class, {MANNER}.", "STAGES = ["]
        for stage in range(len(self.plan.stages)):
            runs = self._runs(stage)
            if not runs:
                lines.append("    [],")
                continue
            lines.append("    [")
            for run in runs:
                first = run[0]
                span = f"range({first.position}, {run[-1].position + 1})"
                parts = (f'"{first.container}"', span, first.callee, manner(first.candidate))
                text = f"        ({', '.join(parts)}),"
                if len(text) > 88:
                    lines += ["        (", *(f"            {part}," for part in parts), "        ),"]
                else:
                    lines.append(text)
            lines.append("    ],")
        return [*lines, "]"]

    def _runs(self, stage: int) -> list[list[Placed]]:
        runs: list[list[Placed]] = []
        for block in self.placed:
            if block.stage != stage or not block.container:
                continue
            last = runs[-1][-1] if runs else None
            if (
                last is not None
                and (last.container, last.callee, manner(last.candidate))
                == (block.container, block.callee, manner(block.candidate))
                and last.position + 1 == block.position
            ):
                runs[-1].append(block)
            else:
                runs.append([block])
        return runs

    def stage_class(self) -> list[str]:
        """``Stage``: parameters in the model's own module tree, forward over its blocks, methods for the ends."""
        methods = [self._method(block) for block in self.placed if not block.path]
        forward = self._forward()
        axis = self._axis
        lines = [
            "class Stage(nn.Module):",
            '    """One pipeline stage, its parameters under the names they have in the model."""'
            if self.many
            else '    """The model, its parameters under the names they have there."""',
            "",
            "    def __init__(self, index: int, new: New) -> None:",
            "        super().__init__()",
            f"        self.{self._index} = index",
        ]
        if any(_uses(axis, text) for text in (*methods, forward)):
            lines.append(f"        self.{axis} = new.axis")
        lines += self._members()
        lines += ["", *self._iterators()]
        lines += ["", *forward]
        for method in methods:
            lines += ["", *method]
        return lines

    # The module tree

    def _members(self) -> list[str]:
        containers = list(dict.fromkeys(block.container for block in self.placed if block.container))
        owned = self._owned()
        made: set[str] = set()
        lines: list[str] = []

        def ensure(path: str, into: list[str], indent: int) -> None:
            parts = path.split(".")
            for count in range(1, len(parts)):
                prefix = ".".join(parts[:count])
                if prefix not in made and prefix not in containers:
                    made.add(prefix)
                    into.extend(assignment(prefix, Call("nn.Module", ()), indent))

        shared = containers + [path for names, _ in owned for path in names]
        for path in shared:
            ensure(path, lines, 2)
        for container in containers:
            lines += assignment(container, Call("nn.ModuleDict", ()), 2)
        if containers:
            lines.append("        for container, positions, block, _ in STAGES[index]:")
            if len(containers) == 1:
                lines[-1] = "        for _, positions, block, _ in STAGES[index]:"
                lines.append("            for i in positions:")
                lines.append(f"                {attribute('self', containers[0])}[str(i)] = block(new)")
            else:
                lines.append("            for i in positions:")
                lines.append("                self.get_submodule(container)[str(i)] = block(new)")
        for names, stage in owned:
            indent = 2
            if self.many:
                lines.append(f"        if index == {stage}:")
                indent = 3
            for path, member in names.items():
                lines += assignment(path, member, indent)
        return lines

    def _owned(self) -> list[tuple[dict[str, Expr], int]]:
        """Per stage, the modules of blocks that are not in a list: module path to `Weights` or a block."""
        found: list[tuple[dict[str, Expr], int]] = []
        for stage in range(len(self.plan.stages)):
            names: dict[str, Expr] = {}
            stored: dict[str, dict[str, Expr]] = {}
            for block in self.placed:
                if block.stage != stage or block.container:
                    continue
                if block.path:
                    names[block.path] = Call(block.callee, (Text("new"),))
                    continue
                for full, (layout, shape) in self._parameters(block).items():
                    owner, _, leaf = full.rpartition(".")
                    if not owner:
                        names[leaf] = parameter_expr(layout, shape)
                    else:
                        stored.setdefault(owner, {}).setdefault(leaf, parameter_expr(layout, shape))
            inner = [block.container for block in self.placed if block.container] + [*names, *stored]
            for owner, members in stored.items():
                if any(path.startswith(f"{owner}.") for path in inner):  # has modules too: keep the one that holds them
                    names |= {f"{owner}.{leaf}": member for leaf, member in members.items()}
                else:
                    names[owner] = _weights(members)
            if names:
                found.append((dict(sorted(names.items(), key=lambda item: item[0].count("."))), stage))
        return found

    def _parameters(self, block: Placed) -> dict[str, tuple[Layout, tuple[int, ...]]]:
        """Full name to stored layout and shape of a block's parameters."""
        graph = self.model.kinds[block.kind].graph
        names = self._names(block)
        return {
            names[node.target]: (
                _stored(block.candidate.decision.inputs[node.name], self.setting),
                node.meta.at(1, 1),
            )
            for node in graph.of("parameter")
        }

    def _names(self, block: Placed) -> dict[str, str]:
        first = {name: group[0] for group in self.model.tied for name in group}
        return {target: first.get(full, full) for target, full in self.model.blocks[block.index].parameters.items()}

    # Code

    def _iterators(self) -> list[str]:
        head = f"    def {blocks_method(self.model)}(self) -> list[nn.Module]:"
        loops = [block for block in self.placed if block.container]
        single = [block for block in self.placed if block.path and not block.container]
        if not loops:
            listed = ", ".join(attribute("self", block.path) for block in single)
            return [head, f"        return [{listed}]"]
        containers = list(dict.fromkeys(block.container for block in loops))
        lines = [head, '        """The blocks of this stage, in order."""']
        if any(path.rpartition(".")[0] in containers for names, _ in self._owned() for path in names):
            # The list has other members too (the ends of a Sequential).
            return [
                *lines,
                "        return [",
                '            self.get_submodule(f"{container}.{i}")',
                f"            for container, positions, _, _ in STAGES[self.{self._index}]",
                "            for i in positions",
                "        ]",
            ]
        if len(containers) == 1:
            expr = f"{attribute('self', containers[0])}.values()"
        else:
            parts = ", ".join(f"*{attribute('self', container)}.values()" for container in containers)
            expr = f"({parts})"
        return [*lines, f"        return [*{expr}]"]

    def _method(self, block: Placed) -> list[str]:
        kind = self.model.kinds[block.kind]
        arguments = argument_names(kind, _flow_arguments(block, self.model))
        names = self._names(block)
        body = _block_body(block, self.model, self.setting, arguments, "self.", {}, names)
        body.axis_text = f"self.{self._axis}"
        # A tied weight is stored as the first block of the stage that has it wants it.
        for other in self.placed:
            if other.stage == block.stage and other.index < block.index and not other.path:
                theirs, ours = self._parameters(other), self._parameters(block)
                for full in theirs.keys() & ours.keys():
                    if theirs[full][0] != ours[full][0]:
                        body.stored[_node_of(kind.graph, names, full)] = theirs[full][0]
        lines = signature(block.callee, list(arguments.values()), [], len(kind.graph.outputs), 1)
        return [*lines, *body.program().lines(2)]

    def _forward(self) -> list[str]:
        flow = flow_names(self.model)
        batch = list(self.model.batch)
        last = self.placed[-1]
        lines = signature("forward", list(flow) if self.many else [], batch, 1, 1, optional=True)
        indent, previous = 2, None
        constants_done = not self.model.constants.outputs
        for block in self.placed:
            if not constants_done and _reads_constants(block, self.model):
                lines += self._constants_call(flow[0], batch, first=previous is None)
                constants_done = True
            if block.container:
                if previous is None or not previous.container:
                    lines += self._loop(block, flow)
                previous = block
                continue
            result = "" if block is last else ", ".join(flow[: len(self.model.kinds[block.kind].graph.outputs)]) + " = "
            margin = indent
            if self.many:
                lines.append(f"        if self.{self._index} == {block.stage}:")
                margin += 1
            prefix = result or "return "
            function = attribute("self", block.path) if block.path else f"self.{block.callee}"
            lines += remark(block.candidate, margin)
            lines += statement(prefix, call(function, block.arguments, block.candidate), str, margin)
            previous = block
        if self.many or last.container:
            lines.append(f"        return {', '.join(flow)}")
        return lines

    def _loop(self, first: Placed, flow: tuple[str, ...]) -> list[str]:
        loops = [block for block in self.placed if block.container]
        if any(block.arguments != first.arguments for block in loops):
            raise UnsupportedError(
                "repeated blocks of this model take different arguments: cannot write one loop over them"
            )
        indices = [block.index for block in loops]
        if indices != list(range(indices[0], indices[-1] + 1)):
            raise UnsupportedError(
                "repeated blocks of this model are interrupted by others: cannot write one loop over them"
            )
        outputs = len(self.model.kinds[first.kind].graph.outputs)
        result = ", ".join(flow[:outputs]) + " = "
        manners = {manner(block.candidate): block.candidate for block in loops}
        if len(manners) == 1:
            lines = statement(result, call("block", first.arguments, first.candidate), str, 3)
            return [f"        for block in self.{blocks_method(self.model)}():", *remark(first.candidate, 3), *lines]
        return [
            f"        for container, positions, _, {MANNER} in STAGES[self.{self._index}]:",
            "            for i in positions:",
            "                block = self.get_submodule(container)[str(i)]",
            *calls_by_manner(result, first.arguments, list(manners.values()), 4),
        ]

    def _constants_call(self, hidden: str, batch: list[str], first: bool) -> list[str]:
        source = batch[0]
        values = {
            "batch": Text(f"{source}.shape[0]"),
            "seq": Text(f"{source}.shape[1]"),
            "dtype": Text(f"{hidden}.dtype"),
            "device": Text(f"{source}.device"),
        }
        wanted = constants_arguments(self.model, self.setting)
        if first and "dtype" in wanted:
            if any(block.path for block in self.model.blocks):
                raise UnsupportedError(
                    "the first block reads shared tables in the compute dtype, before any activation tells it"
                )
            # All parameters are the stage's own, which FSDP2 has gathered in the compute dtype when forward begins.
            values["dtype"] = Text("next(self.parameters()).dtype")
        names = [argument_name(name) for name in self.model.constants.outputs]
        return statement(f"{', '.join(names)} = ", Call("shared_tables", tuple(values[key] for key in wanted)), str, 2)


def _node_of(graph: OpGraph, names: dict[str, str], full: str) -> str:
    return next(node.name for node in graph.of("parameter") if names[node.target] == full)


def _reads_constants(block: Placed, model: ModelGraph) -> bool:
    return any(source.origin == "constant" for source in model.blocks[block.index].inputs.values())
