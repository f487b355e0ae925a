"""One graph under one decision as the body of a function: operators on local shards, conversions as collectives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from autopar.codegen.expressions import render
from autopar.codegen.hints import attention_names, logits_names, module_name, query_first
from autopar.codegen.positions import is_sequence
from autopar.codegen.remarks import inner_remarks, step_remarks
from autopar.codegen.setting import Setting
from autopar.codegen.site import Site, Sizes
from autopar.codegen.source import Argument, Binary, Call, Expr, Method, Text, Value, literal, text_of, values_in
from autopar.codegen.statements import Program, Step
from autopar.codegen.wiring import is_writable
from autopar.errors import UnsupportedError
from autopar.graph.ir import COMPUTE, Node, OpGraph, substitute
from autopar.graph.ops import draws_random
from autopar.graph.size import BATCH, SEQ, Size, size_at
from autopar.sharding.check import chosen
from autopar.sharding.conversions import Step as Conversion
from autopar.sharding.conversions import path, same, steps
from autopar.sharding.decision import BlockDecision
from autopar.sharding.layout import CONTEXT, Layout, R, SpmdType
from autopar.sharding.local import produced_layouts
from autopar.sharding.rules import ring_axis

FUNCTIONS = {
    "SR": "all_gather",
    "SI": "all_gather_invariant",
    "PR": "all_reduce",
    "PI": "all_reduce_invariant",
    "PS": "reduce_scatter",
    "IR": "replicate",
    "RS": "shard",
    "IS": "shard_invariant",
    "SS": "all_to_all",
    "SP": "zero_pad",
    "RP": "keep_first",
    "IP": "keep_first_invariant",
}
"""The function of `runtime/collectives.py` for each pair of types."""

_VARIANTS = {
    "aten.embedding": ("vocab_embedding", 0, 0),
    "autopar.cross_entropy": ("vocab_cross_entropy", 0, -1),
    "aten.scaled_dot_product_attention": ("context_attention", 0, -2),
    "autopar.experts": ("experts", 3, 0),
}
"""The function of `runtime/operators.py` or `runtime/experts.py`, an operand of which a dim is split, and that dim."""
_ELEMENTWISE = (
    "add sub mul div neg silu gelu relu tanh sigmoid pow rsqrt mean sum softmax eq ne lt gt le ge where cos sin"
)
_SHAPE = (
    "unflatten flatten reshape view transpose t permute unsqueeze squeeze expand slice select contiguous cast detach"
)
_GROUPS = dict.fromkeys(_ELEMENTWISE.split(), "elementwise") | dict.fromkeys(_SHAPE.split(), "shape")


@dataclass(frozen=True, slots=True)
class _Blocked:
    """Dims that are seen as (blocks, rest) while a conversion splits the rest, and how many blocks each has."""

    dims: tuple[tuple[int, Expr], ...] = ()

    def place(self, dim: int) -> int:
        """Where the part of ``dim`` that converts is: dims behind a dim seen as two have moved."""
        return dim + sum(other <= dim for other, _ in self.dims)


@dataclass(slots=True)
class Body:
    """Writes one graph. ``arguments``: input node name to argument name; ``weights``: parameter and buffer node name
    to the expression that is its local tensor; ``decision`` None: nothing is split. ``stored``: layouts of weights that
    are not stored as the decision wants them (tied ones). ``axes``: the text of each model axis. ``names``: what to
    call the values of some nodes. ``path``: where the model has it, for messages."""

    graph: OpGraph
    decision: BlockDecision | None
    setting: Setting
    arguments: Mapping[str, str]
    weights: Mapping[str, Expr]
    axes: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict)
    reserved: frozenset[str] = frozenset()
    stored: dict[str, Layout] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    path: str = ""
    _steps: list[Step] = field(default_factory=list)
    _held: dict[str, list[tuple[Layout, str]]] = field(default_factory=dict)
    _hints: dict[str, str] = field(default_factory=dict)
    _converted: dict[str, Expr] = field(default_factory=dict)

    def program(self) -> Program:
        """The statements. Raises UnsupportedError for what cannot be written."""
        self.names |= attention_names(self.graph) | logits_names(self.graph)
        for node in self.graph.nodes.values():
            if node.kind == "input":
                self._add_input(node)
            elif node.kind != "op":
                self._add_weight(node)
            else:
                self._add_op(node)
        outputs = tuple(self._materialise(name, self._promised(name)) for name in self.graph.outputs)
        arguments = {f"input {name}": text for name, text in self.arguments.items()}
        arguments |= {key: text for key, text in self.extra.items() if self._reads(key)}
        # A view that only conversions would have read, which read what it is a view of (`_flattened_from`).
        read = {key for step in self._steps for key in values_in(step.expr)} | set(outputs)
        self._steps = [step for step in self._steps if step.group != "shape" or step.key in read]
        steps = query_first(self.graph, self._steps)
        return Program(arguments, [*self._preamble(), *steps], outputs, self.reserved)

    # Values

    def _add_input(self, node: Node) -> None:
        key = f"input {node.name}"
        self._hints[key] = self.arguments[node.name]
        self._held[node.name] = [(self._arrives(node.name), key)]

    def _add_weight(self, node: Node) -> None:
        key = f"weight {node.name}"
        leaf = node.target.rpartition(".")[2]
        self._hints[key] = leaf if is_writable(leaf) else "weight"
        group = "weight" if node.kind == "parameter" else "operator"
        self._steps.append(Step(key, self.weights[node.name], self._hints[key], group))
        stored, wanted = self.stored.get(node.name), self._arrives(node.name)
        if stored is not None:
            key = self._convert(node, key, stored, wanted)
        self._held[node.name] = [(wanted, key)]

    def _add_op(self, node: Node) -> None:
        operands = node.operands()
        needs, output, variants = [Layout()] * len(operands), Layout(), set()
        if self.decision is not None and self.setting.axes:
            strategies = chosen(node, self.graph, self.decision)
            choice = {axis: strategy for axis, strategy in strategies.items() if axis in self.setting.axes}
            read_as, output = produced_layouts(node, choice)
            needs = list(read_as)
            variants = {strategy.variant for strategy in choice.values() if strategy.variant}
        read = iter([Value(self._materialise(name, need)) for name, need in zip(operands, needs, strict=True)])
        args, kwargs = substitute((node.args, node.kwargs), lambda _: next(read))
        shapes = tuple(self.graph.nodes[name].meta.shape for name in operands)
        site = Site(node, args, kwargs, shapes, output, self._sizes())
        try:
            expr = render(site)
        except UnsupportedError as error:
            place = ".".join(part for part in (self.path, node.module) if part) or "the model itself"
            raise UnsupportedError(f"{node.op} in {place}: {error}") from error
        comments: tuple[str, ...] = ()
        if node.kwargs.get("ep", 1) > 1:
            assert isinstance(expr, Call)
            expr = Call(expr.function, (*expr.arguments, ("ep", Text(self.axes["ep"]))))
        if variants:
            expr = self._special(node, expr, shapes, needs, ring_axis(choice))
            comments = inner_remarks(self.setting, choice, needs)
        split = [axis for axis, kind in output.types if kind.kind == "S" and axis in self.setting.axes]
        if split and draws_random(node):
            expr = _with_own_numbers(expr, self._axes_expr(split))
        key = f"op {node.name}"
        self._hints[key] = self._hint(node, site)
        group = _GROUPS.get(node.op.partition(".")[2], "operator")
        self._steps.append(Step(key, expr, self._hints[key], group, comments))
        self._held[node.name] = [(output, key)]

    def _special(
        self,
        node: Node,
        plain: Expr,
        shapes: Sequence[tuple[int | Size, ...]],
        layouts: Sequence[Layout],
        ring: str = "",
    ) -> Expr:
        """The call of an operator whose shards need more than the operator itself; ``shapes`` and ``layouts``: those of
        its operands; ``ring``: the axis that keys and values go round, if they do."""
        if node.op not in _VARIANTS:
            raise UnsupportedError(f"{node.name} ({node.op}): no implementation for how the plan splits it")
        function, operand, dim = _VARIANTS[node.op]
        dim %= len(shapes[operand])
        axes, size = layouts[operand].splits(dim), shapes[operand][dim]
        assert isinstance(plain, Call)
        if node.op == "autopar.experts":
            return Call(function, (*plain.arguments, ("axis", self._axes_expr(axes))))
        if ring:
            order = [("balanced", literal(True))] if self.setting.balanced and ring == CONTEXT else []
            rest = [a for a in plain.arguments[3:] if a != ("enable_gqa", literal(True))]
            return Call("ring_attention", (*plain.arguments[:3], Text(self.axes[ring]), *order, *rest))
        count = 3 if node.op == "aten.scaled_dot_product_attention" else 2
        arguments: tuple[Argument, ...] = plain.arguments[:count]
        rest = [a for a in plain.arguments[len(arguments) :] if a != ("is_causal", literal(True))]
        added: list[Argument] = []
        if node.op == "aten.scaled_dot_product_attention":
            if self.setting.balanced and axes[0] == CONTEXT:
                added.append(("balanced", literal(True)))
        elif isinstance(size, int) and size % prod(self.setting.axes[axis] for axis in axes):
            added.append(("vocabulary", literal(size)))
        return Call(function, (*arguments, self._axes_expr(axes), *added, *rest))

    def _axes_expr(self, axes: Sequence[str]) -> Expr:
        """One axis, or a tuple of several, outermost first."""
        texts = tuple(Text(self.axes[axis]) for axis in axes)
        return texts[0] if len(texts) == 1 else Call("", texts)

    def _arrives(self, name: str) -> Layout:
        return self._reduced(self.decision.inputs[name]) if self.decision is not None else Layout()

    def _promised(self, name: str) -> Layout:
        return self._reduced(self.decision.outputs[name]) if self.decision is not None else Layout()

    def _reduced(self, layout: Layout) -> Layout:
        return Layout(tuple((axis, kind) for axis, kind in layout.types if axis in self.setting.axes))

    # Conversions

    def _materialise(self, name: str, target: Layout) -> str:
        """The key of tensor ``name`` in ``target``; conversions are written where they are first needed."""
        node = self.graph.nodes[name]
        grad = node.meta.requires_grad
        for layout, key in self._held[name]:
            if same(layout, target, grad):
                return key
        assert self.decision is not None
        for conversion in self.decision.conversions:
            if conversion.tensor == name and same(self._reduced(conversion.target), target, grad):
                source = self._reduced(conversion.source)
                key = self._materialise(name, source)
                key = self._convert(node, key, source, target)
                self._held[name].append((target, key))
                return key
        raise UnsupportedError(
            f"{self.decision.kind}: {name} is needed as {target}, but the decision holds it as "
            f"{', '.join(str(layout) for layout, _ in self._held[name])} and has no conversion to that"
        )

    def _convert(self, node: Node, key: str, source: Layout, target: Layout) -> str:
        """The key of ``key``, held as ``source``, after the steps to ``target``."""
        hint, blocked = self._hints[key], _Blocked()
        for axis, step in self._path(node, source, target):
            function = FUNCTIONS.get(step.source.kind + step.target.kind, "")
            if function and (function != "replicate" or node.meta.requires_grad):
                split = [kind for kind in (step.source, step.target) if kind.kind == "S"]
                wanted = _Blocked(
                    tuple(
                        (kind.dim, self._sizes().expr(kind.blocks, self._ways(source, axis, kind)))
                        for kind in sorted(split, key=lambda kind: kind.dim)
                        if kind.blocks != 1
                    )
                )
                key, blocked = self._view(key, hint, blocked, wanted), wanted
                key = self._exchange(node, key, axis, step, source, blocked)
            source = source.with_type(axis, step.target)
        return self._view(key, hint, blocked, _Blocked())

    def _path(self, node: Node, source: Layout, target: Layout) -> Iterator[tuple[str, Conversion]]:
        """The steps from ``source`` to ``target``. Between two dims by position in balanced order the whole is gathered
        and cut: an all-to-all would leave the one it splits in that order."""
        grad = node.meta.requires_grad
        for axis, step in path(source, target, grad):
            split = [kind for kind in (step.source, step.target) if kind.kind == "S"]
            ordered = [kind for kind in split if is_sequence(node.meta.shape[kind.dim], kind)]
            if self.setting.balanced and axis == CONTEXT and len(ordered) > 1:
                yield from (
                    (axis, part) for pair in ((step.source, R), (R, step.target)) for part in steps(*pair, grad)
                )
            else:
                yield axis, step

    def _view(self, key: str, hint: str, old: _Blocked, new: _Blocked) -> str:
        """The value of ``key``, whose dims ``old`` are seen as (blocks, rest), with ``new`` seen so instead."""
        if old != new:
            for dim, _ in old.dims:
                key = self._step(
                    f"{key} whole", Method(Value(key), "flatten", (literal(dim), literal(dim + 1))), hint, "shape"
                )
            inner = self._flattened_from(key, *new.dims[0]) if len(new.dims) == 1 else ""
            if inner:
                return inner
            for dim, blocks in reversed(new.dims):
                sizes = Call("", (blocks, literal(-1)))
                key = self._step(f"{key} blocks", Method(Value(key), "unflatten", (literal(dim), sizes)), hint, "shape")
        return key

    def _flattened_from(self, key: str, dim: int, blocks: Expr) -> str:
        """The value that ``key`` is a flattened view of, if that has these blocks in dim ``dim``; else ""."""
        node = self.graph.nodes.get(key.removeprefix("op "))
        if node is None or node.op != "aten.flatten" or node.args[1:] != (dim, dim + 1):
            return ""
        operand = node.operands()[0]
        read = [name for step in self._steps if step.key == key for name in values_in(step.expr)]
        for layout, inner in self._held[operand]:
            if inner in read and not layout.splits(dim):
                return inner if self._sizes().expr(self.graph.nodes[operand].meta.shape[dim]) == blocks else ""
        return ""

    def _exchange(self, node: Node, key: str, axis: str, step: Conversion, layout: Layout, blocked: _Blocked) -> str:
        """One step on one axis of a tensor that is held as ``layout`` and seen as ``blocked``."""
        split = [kind for kind in (step.source, step.target) if kind.kind == "S"]
        dims = [literal(blocked.place(kind.dim)) for kind in split]
        options: list[Argument] = []
        if self.setting.balanced and axis == CONTEXT:
            whole = node.meta.shape
            ordered = [dim for kind, dim in zip(split, dims, strict=True) if is_sequence(whole[kind.dim], kind)]
            options = [("balanced", literal(True) if len(split) == 1 else dim) for dim in ordered]
        function = FUNCTIONS[step.source.kind + step.target.kind]
        call = Call(function, (Value(key), Text(self.axes[axis]), *dims, *options))
        group = "weight" if key.startswith("weight ") and not blocked.dims else "exchange"
        comments = step_remarks(self.setting, node, axis, step, layout)
        return self._step(f"{key} {axis}:{step.target}", call, self._hints[key], group, comments)

    def _ways(self, layout: Layout, axis: str, kind: SpmdType) -> int:
        """In how many parts axes outside ``axis`` have cut the blocks of ``kind``: they split a more major factor."""

        def count(blocks: int | Size) -> int:
            return size_at(blocks, self.setting.micro_batch, self.setting.seq_len)

        outer = [name for name in layout.splits(kind.dim) if name != axis]
        return prod(self.setting.axes[name] for name in outer if count(layout[name].blocks) < count(kind.blocks))

    def _step(self, key: str, expr: Expr, hint: str, group: str, comments: tuple[str, ...] = ()) -> str:
        """The key of one more value; of one there is where ways to two layouts begin alike."""
        while key in self._converted:
            if self._converted[key] == expr:
                return key
            key += " again"
        self._converted[key] = expr
        self._hints[key] = hint
        self._steps.append(Step(key, expr, hint, group, comments))
        return key

    # Names and sizes

    def _sizes(self) -> Sizes:
        known: dict[Size, Expr] = {}
        for symbol, letter in ((BATCH, "b"), (SEQ, "s")):
            if f"size {letter}" in self.extra or self._source_of(symbol) is not None:
                known[symbol] = Value(f"size {letter}")
        return Sizes(self.setting.axes, known, self.setting.double)

    def _source_of(self, symbol: Size) -> Expr | None:
        for node in self.graph.of("input"):
            if symbol in node.meta.shape:
                dim = node.meta.shape.index(symbol)
                size: Expr = Method(Text(f"{self.arguments[node.name]}.shape"), "[]", (literal(dim),))
                for axis in self._arrives(node.name).splits(dim):
                    size = Binary("*", size, Text(f"{self.axes[axis]}.size()"))
                return size
        return None

    def _reads(self, key: str) -> bool:
        return any(key in values_in(step.expr) for step in self._steps)

    def _preamble(self) -> list[Step]:
        """Sizes, dtype and device, where some expression asks for them."""
        first = next((node for node in self.graph.of("input")), None)
        wide = next((node for node in self.graph.of("input") if node.meta.dtype == COMPUTE), None)
        found: dict[str, Expr | None] = {
            "size b": self._source_of(BATCH),
            "size s": self._source_of(SEQ),
            "dtype": Text(f"{self.arguments[wide.name]}.dtype") if wide else self._weight_dtype(),
            "device": Text(f"{self.arguments[first.name]}.device") if first else None,
        }
        names = {"size b": "batch", "size s": "seq", "dtype": "dtype", "device": "device"}
        steps = []
        for key, expr in found.items():
            if key in self.extra or not self._reads(key):
                continue
            if expr is None:
                raise UnsupportedError(f"no input of the block tells the {names[key]} that it needs")
            # Read before the argument's name is given to another value.
            steps.append(Step(key, expr, names[key], "preamble"))
        return steps

    def _weight_dtype(self) -> Expr | None:
        """The compute dtype by a parameter, which FSDP2 has gathered in it, where all inputs are wider."""
        weight = next((node for node in self.graph.of("parameter") if node.meta.dtype == COMPUTE), None)
        return Text(f"{text_of(self.weights[weight.name], str)}.dtype") if weight else None

    def _hint(self, node: Node, site: Site) -> str:
        """The name a person would give: the module that computed it, or the operand it is a view or update of."""
        op = node.op.partition(".")[2]
        operands = [self._hints[value.key] for value in _values(site.args)]
        part = module_name(node.module)
        if node.name in self.names:
            return self.names[node.name]
        if op == "scaled_dot_product_attention":
            return "heads"
        if op == "arange":
            return "positions"
        if op == "flatten" and operands[0] == "heads":
            return "merged"
        if op in ("cross_entropy", "nll_loss"):
            return "loss"
        if op in ("rms_norm", "layer_norm"):
            return "normed"
        if op in ("topk", "experts"):
            return {"topk": "chosen", "experts": "mixed"}[op]
        if op in ("linear", "addmm", "embedding", "matmul", "bmm", "mm"):
            return part or "product"
        if op == "add" and self._is_residual(node):
            return next((hint for hint in operands if hint in self.arguments.values()), operands[0])
        if op == "add" and len(node.meta.shape) == 3 and self._joins_modules(node):
            return "hidden"
        if op == "sub" and set(operands) == {"positions"}:
            return "distance"
        if op in ("mul", "add", "sub", "div") and len(operands) > 1 and self.decision is not None:
            return part or operands[0]
        return operands[0] if operands else (part or op)

    def _joins_modules(self, node: Node) -> bool:
        """Whether the model itself adds what its parts made: token and position embeddings."""
        made_by = [self.graph.nodes[name].module for name in node.operands()]
        return "." not in node.module and all(module.startswith(f"{node.module}.") for module in made_by)

    def _is_residual(self, node: Node) -> bool:
        shapes = [self.graph.nodes[name].meta.shape for name in node.operands()]
        return len(shapes) == 2 and shapes[0] == shapes[1] == node.meta.shape


def _values(args: object) -> list[Value]:
    if isinstance(args, Value):
        return [args]
    return [value for item in args for value in _values(item)] if isinstance(args, tuple) else []


_OWN_NUMBERS = {"F.dropout": "dropout", "F.scaled_dot_product_attention": "attention"}


def _with_own_numbers(plain: Expr, axes: Expr) -> Expr:
    """The call whose random numbers differ between the shards of its result."""
    assert isinstance(plain, Call)
    if plain.function == "context_attention":
        return Call(plain.function, (*plain.arguments, ("split", axes)))
    return Call(_OWN_NUMBERS.get(plain.function, plain.function), (*plain.arguments, ("axis", axes)))
