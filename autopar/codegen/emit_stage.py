"""The class ``Stage`` of ``module.py`` and the table ``STAGES``: which blocks a stage has, how they hang together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopar.codegen.calls import MANNER, call, calls_by_manner, manner, remark
from autopar.codegen.emit_chain import forward_parts, forward_signature, is_plain
from autopar.codegen.emit_class import (
    axis_assignments,
    axis_names,
    block_body,
    flow_arguments,
    signature,
    stored_layout,
)
from autopar.codegen.emit_constants import constants_arguments
from autopar.codegen.members import assignment, attribute, parameter_expr, weights
from autopar.codegen.setting import Setting
from autopar.codegen.source import Argument, Call, Expr, Text, literal, statement
from autopar.codegen.wiring import (
    Placed,
    argument_name,
    argument_names,
    blocks_method,
    flow_names,
    free_name,
    table_names,
    top_names,
)
from autopar.errors import UnsupportedError
from autopar.graph.ir import COMPUTE, ModelGraph, OpGraph, TensorMeta
from autopar.graph.size import BATCH, SEQ, Size
from autopar.plan import Plan
from autopar.sharding.layout import CONTEXT, Layout


@dataclass(frozen=True, slots=True)
class StageWriter:
    """Writes ``STAGES`` and the class ``Stage``. ``split``: dims of shared tables that cp splits."""

    plan: Plan
    model: ModelGraph
    placed: tuple[Placed, ...]
    setting: Setting
    split: Mapping[str, int]

    @property
    def many(self) -> bool:
        return len(self.plan.stages) > 1

    @property
    def _axes(self) -> dict[str, str]:
        return axis_names(self.setting, top_names(self.model))

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
                start = f"{first.position}, " if first.position else ""
                span = f"range({start}{run[-1].position + 1})"
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
        lines += axis_assignments(self._axes, [line for text in (*methods, forward) for line in text])
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

        single = [path for names, _ in owned for path in names]
        for path in (*containers, *(path for path in single if not _inside(path, containers))):
            ensure(path, lines, 2)
        for container in containers:
            lines += assignment(container, Call("nn.ModuleDict", ()), 2)
        for path in (path for path in single if _inside(path, containers)):
            ensure(path, lines, 2)
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
                for full, (layout, meta) in self._parameters(block).items():
                    member = parameter_expr(layout, meta.at(1, 1), self.setting.axes, full, meta.requires_grad)
                    owner, _, leaf = full.rpartition(".")
                    if not owner:
                        names[leaf] = member
                    else:
                        stored.setdefault(owner, {}).setdefault(leaf, member)
            inner = [block.container for block in self.placed if block.container] + [*names, *stored]
            for owner, members in stored.items():
                if any(path.startswith(f"{owner}.") for path in inner):  # has modules too: keep the one that holds them
                    names |= {f"{owner}.{leaf}": member for leaf, member in members.items()}
                else:
                    names[owner] = weights(members)
            if names:
                found.append((dict(sorted(names.items(), key=lambda item: item[0].count("."))), stage))
        return found

    def _parameters(self, block: Placed) -> dict[str, tuple[Layout, TensorMeta]]:
        """Full name to stored layout and meta of a block's parameters."""
        graph = self.model.kinds[block.kind].graph
        names = self._names(block)
        return {
            names[node.target]: (
                stored_layout(block.candidate.decision.inputs[node.name], self.setting),
                node.meta,
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
        if any(_inside(path, containers) for names, _ in self._owned() for path in names):
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
        arguments = argument_names(kind, flow_arguments(block, self.model))
        names = self._names(block)
        body = block_body(block, self.model, self.setting, arguments, self._axes, names)
        # A tied weight is stored as the first block of the stage that has it wants it.
        ours = self._parameters(block)
        stored: dict[str, Layout] = {}
        for other in self.placed:
            if other.stage == block.stage and other.index < block.index and not other.path:
                stored = {full: layout for full, (layout, _) in self._parameters(other).items()} | stored
        for full in stored.keys() & ours.keys():
            if stored[full] != ours[full][0]:
                body.stored[_node_of(kind.graph, names, full)] = stored[full]
        lines = signature(block.callee, list(arguments.values()), [], len(kind.graph.outputs), 1)
        return [*lines, *body.program().lines(2)]

    def _forward(self) -> list[str]:
        return self._plain_forward() if is_plain(self.placed, self.model) else self._chained_forward()

    def _chained_forward(self) -> list[str]:
        lines = forward_signature(self.placed, self.model, self._index, self.many)
        constants_done = not self.model.constants.outputs
        for first, part in forward_parts(self.placed, self.model, self._index, self.many):
            reads = any(_reads_constants(b, self.model) for b in self.placed[first.index :] if _of(first, b))
            if not constants_done and reads:
                hidden = flow_names(self.model)[0]
                lines += self._constants_call(hidden, list(self.model.batch), first=first.index == 0)
                constants_done = True
            lines += part
        return lines

    def _plain_forward(self) -> list[str]:
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
            "batch": self._size_text(BATCH) or Text(f"{source}.shape[0]"),
            "seq": self._size_text(SEQ) or Text(f"{source}.shape[1]"),
            "dtype": Text(f"{hidden}.dtype"),
            "device": Text(f"{source}.device"),
        }
        wanted = constants_arguments(self.model, self.setting)
        if first and "dtype" in wanted:
            values["dtype"] = self._first_dtype(hidden)
        names = table_names(self.model)
        lines = statement(
            f"{', '.join(names.values())} = ", Call("shared_tables", tuple(values[key] for key in wanted)), str, 2
        )
        for key, dim in self.split.items():
            name = Text(names[key])
            order: list[Argument] = [("balanced", literal(True))] if self.setting.balanced else []
            part = Call("shard", (name, Text(f"self.{self._axes[CONTEXT]}"), literal(dim), *order))
            lines += statement(f"{name.text} = ", part, str, 2)
        return lines

    def _size_text(self, symbol: int | Size) -> Text | None:
        """A batch tensor's dim of size ``symbol``."""
        for key, meta in self.model.batch.items():
            if symbol in meta.shape:
                return Text(f"{argument_name(key)}.shape[{meta.shape.index(symbol)}]")
        return None

    def _first_dtype(self, hidden: str) -> Text:
        """The compute dtype before any activation tells it: that of a batch tensor which is in it, or of a parameter of
        the first block, which is the stage's own, so that FSDP2 has gathered it in the compute dtype when forward
        begins."""
        if not any(block.path for block in self.model.blocks):
            return Text("next(self.parameters()).dtype")
        block = self.placed[0]
        graph = self.model.kinds[block.kind].graph
        weight = next((node for node in graph.of("parameter") if node.meta.dtype == COMPUTE), None)
        given = next((key for key, meta in self.model.batch.items() if meta.dtype == COMPUTE), None)
        if given is not None:
            tells = argument_name(given)
        elif weight is not None and not block.path:
            tells = attribute("self", self._names(block)[weight.target])
        else:
            raise UnsupportedError(
                "the first block reads shared tables in the compute dtype, before any activation, batch tensor or "
                "parameter of the stage itself tells it"
            )
        return Text(f"({hidden} if self.{self._index} else {tells}).dtype" if self.many else f"{tells}.dtype")


def _node_of(graph: OpGraph, names: dict[str, str], full: str) -> str:
    return next(node.name for node in graph.of("parameter") if names[node.target] == full)


def _inside(path: str, containers: Sequence[str]) -> bool:
    return any(path.startswith(f"{container}.") for container in containers)


def _of(first: Placed, block: Placed) -> bool:
    """Whether ``block`` is written in the part of forward that begins with ``first``."""
    return block.container == first.container if first.container else block is first


def _reads_constants(block: Placed, model: ModelGraph) -> bool:
    return any(source.origin == "constant" for source in model.blocks[block.index].inputs.values())
