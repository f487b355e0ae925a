"""One graph under one decision as the body of a function: operators on local shards, conversions as collectives."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from autopar.codegen import positions
from autopar.codegen.expressions import Site, Sizes, render
from autopar.codegen.positions import in_order, is_sequence
from autopar.codegen.source import Argument, Binary, Call, Expr, Method, Text, Value, literal, values_in
from autopar.codegen.statements import Program, Step
from autopar.codegen.wiring import is_writable
from autopar.errors import UnsupportedError
from autopar.graph.ir import COMPUTE, Node, OpGraph, substitute
from autopar.graph.ops import draws_random
from autopar.graph.size import BATCH, SEQ, Size, size_at
from autopar.sharding.check import chosen
from autopar.sharding.conversions import Step as Conversion
from autopar.sharding.conversions import path, same
from autopar.sharding.decision import BlockDecision
from autopar.sharding.layout import Layout
from autopar.sharding.local import produced_layouts

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
    "aten.embedding": ("vocab_embedding", 0),
    "autopar.cross_entropy": ("vocab_cross_entropy", -1),
    "aten.scaled_dot_product_attention": ("context_attention", -2),
}
"""The function of `runtime/operators.py`, and the dim of the first operand that is split."""
_ELEMENTWISE = (
    "add sub mul div neg silu gelu relu tanh sigmoid pow rsqrt mean sum softmax eq ne lt gt le ge where cos sin"
)
_SHAPE = (
    "unflatten flatten reshape view transpose t permute unsqueeze squeeze expand slice select contiguous cast detach"
)
_GROUPS = dict.fromkeys(_ELEMENTWISE.split(), "elementwise") | dict.fromkeys(_SHAPE.split(), "shape")


@dataclass(frozen=True, slots=True)
class Setting:
    """What the emitted code is for: sizes of the model axes larger than one, the precision, and one micro-batch.

    ``balanced``: cp holds sequences in balanced order (see `positions`). ``seconds(kind, bytes, axis)`` predicts a
    collective, if it can.
    """

    axes: Mapping[str, int]
    double: bool
    micro_batch: int
    seq_len: int
    compute_bytes: int
    balanced: bool = False
    seconds: Callable[[str, int, str], float | None] = lambda kind, nbytes, axis: None

    @property
    def splits(self) -> tuple[str, ...]:
        """The axes that may split parameters: all but cp."""
        return tuple(axis for axis in self.axes if axis != positions.AXIS)


@dataclass(slots=True)
class Body:
    """Writes one graph. ``arguments``: input node name to argument name; ``weights``: parameter and buffer node name
    to the expression that is its local tensor; ``decision`` None: nothing is split. ``stored``: layouts of weights that
    are not stored as the decision wants them (tied ones). ``axes``: the text of each model axis. ``names``: what to
    call the values of some nodes."""

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
    _steps: list[Step] = field(default_factory=list)
    _held: dict[str, list[tuple[Layout, str]]] = field(default_factory=dict)
    _hints: dict[str, str] = field(default_factory=dict)

    def program(self) -> Program:
        """The statements. Raises UnsupportedError for what cannot be written."""
        self.names |= _attention_names(self.graph) | _logits_names(self.graph)
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
        return Program(arguments, [*self._preamble(), *self._steps], outputs, self.reserved)

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
            metas = [self.graph.nodes[name].meta for name in operands]
            needs = [in_order(layout, meta.shape) for layout, meta in zip(read_as, metas, strict=True)]
            output = in_order(output, node.meta.shape)
            variants = {strategy.variant for strategy in choice.values() if strategy.variant}
        read = iter([Value(self._materialise(name, need)) for name, need in zip(operands, needs, strict=True)])
        args, kwargs = substitute((node.args, node.kwargs), lambda _: next(read))
        shapes = tuple(self.graph.nodes[name].meta.shape for name in operands)
        site = Site(node, args, kwargs, shapes, output, self._sizes())
        expr = render(site)
        if variants:
            expr = self._special(node, expr, shapes[0], needs[0])
        split = [axis for axis, kind in output.types if kind.kind == "S" and axis in self.setting.axes]
        if split and draws_random(node):
            expr = _with_own_numbers(expr, self._axes_expr(split))
        key = f"op {node.name}"
        self._hints[key] = self._hint(node, site)
        self._steps.append(Step(key, expr, self._hints[key], _GROUPS.get(node.op.partition(".")[2], "operator")))
        self._held[node.name] = [(output, key)]

    def _special(self, node: Node, plain: Expr, shape: tuple[int | Size, ...], first: Layout) -> Expr:
        """The call of an operator whose shards need more than the operator itself; ``shape`` and ``first``: those of
        its first operand."""
        if node.op not in _VARIANTS:
            raise UnsupportedError(f"{node.name} ({node.op}): no implementation for how the plan splits it")
        function, dim = _VARIANTS[node.op]
        dim %= len(shape)
        axes, size = first.splits(dim), shape[dim]
        assert isinstance(plain, Call)
        count = 3 if node.op == "aten.scaled_dot_product_attention" else 2
        arguments: tuple[Argument, ...] = plain.arguments[:count]
        rest = [a for a in plain.arguments[len(arguments) :] if a != ("is_causal", literal(True))]
        added: list[Argument] = []
        if node.op == "aten.scaled_dot_product_attention":
            if self.setting.balanced and axes[0] == positions.AXIS:
                added.append(("balanced", literal(True)))
        elif isinstance(size, int) and size % prod(self.setting.axes[axis] for axis in axes):
            added.append(("vocabulary", literal(size)))
        return Call(function, (*arguments, self._axes_expr(axes), *rest, *added))

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
        for axis, step in path(source, target, node.meta.requires_grad):
            key = self._exchange(node, key, axis, step, source)
            source = source.with_type(axis, step.target)
        return key

    def _exchange(self, node: Node, key: str, axis: str, step: Conversion, layout: Layout) -> str:
        """One step on one axis of a tensor that is held as ``layout``."""
        function = FUNCTIONS.get(step.source.kind + step.target.kind, "")
        if not function or (function == "replicate" and not node.meta.requires_grad):
            return key
        hint, is_weight = self._hints[key], key.startswith("weight ")
        split = [kind for kind in (step.source, step.target) if kind.kind == "S"]
        blocked = sorted((kind.dim, kind.blocks) for kind in split if kind.blocks != 1)
        for dim, blocks in reversed(blocked):
            sizes = Call("", (self._sizes().expr(blocks, self._ways(layout, axis, dim, blocks)), literal(-1)))
            key = self._step(f"{key} blocks", Method(Value(key), "unflatten", (literal(dim), sizes)), hint, "shape")
        # Dims behind a dim seen as (blocks, rest) have moved, and it is the rest that converts.
        dims = [literal(kind.dim + sum(other <= kind.dim for other, _ in blocked)) for kind in split]
        options: list[Argument] = []
        if self.setting.balanced and axis == positions.AXIS:
            whole = node.meta.shape
            ordered = [dim for kind, dim in zip(split, dims, strict=True) if is_sequence(whole[kind.dim], kind)]
            if len(ordered) > 1:
                raise UnsupportedError(
                    f"{node.name}: an all-to-all on cp between two sequence dims, both in balanced order"
                )
            options = [("balanced", literal(True) if len(split) == 1 else dim) for dim in ordered]
        call = Call(function, (Value(key), Text(self.axes[axis]), *dims, *options))
        group = "weight" if is_weight and not blocked else "exchange"
        key = self._step(f"{key} {axis}:{step.target}", call, hint, group, self._comments(node, axis, step, layout))
        for dim, _ in blocked:
            views = (literal(dim), literal(dim + 1))
            key = self._step(f"{key} whole", Method(Value(key), "flatten", views), hint, "shape")
        return key

    def _ways(self, layout: Layout, axis: str, dim: int, blocks: int | Size) -> int:
        """In how many parts axes outside ``axis`` have cut the ``blocks`` of a dim: they split a more major factor."""

        def count(blocks: int | Size) -> int:
            return size_at(blocks, self.setting.micro_batch, self.setting.seq_len)

        outer = [name for name in layout.splits(dim) if name != axis and count(layout[name].blocks) < count(blocks)]
        return prod(self.setting.axes[name] for name in outer)

    def _step(self, key: str, expr: Expr, hint: str, group: str, comments: tuple[str, ...] = ()) -> str:
        self._hints[key] = hint
        self._steps.append(Step(key, expr, hint, group, comments))
        return key

    def _comments(self, node: Node, axis: str, step: Conversion, layout: Layout) -> tuple[str, ...]:
        """What moves: bytes of the tensor that is whole on the axis and this rank's part along the others, for one
        micro-batch, forward and backward."""
        forward = _action(step.forward) if step.forward_bytes else ""
        back = _action(step.backward) if step.backward_bytes else "nothing to move"
        nbytes = self.setting.compute_bytes if node.meta.dtype == COMPUTE else 4
        for size in node.meta.at(self.setting.micro_batch, self.setting.seq_len):
            nbytes *= size
        others = (name for name, kind in layout.types if kind.kind == "S" and name != axis)
        nbytes //= prod(self.setting.axes[name] for name in others)
        amount = _amount(nbytes)
        what = node.target if node.kind == "parameter" else "per micro-batch"
        if not forward:
            if step.source.kind == "I" and node.kind == "parameter":
                return ()
            return (f"{axis}: nothing to move; backward: {back}" + (f" of {amount}" if step.backward_bytes else ""),)
        seconds = self.setting.seconds(step.forward, nbytes, axis)
        time = f", {_time(seconds)}" if seconds is not None else ""
        return (f"{axis} {forward}, {amount} {what}{time}; backward: {back}",)

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
            "dtype": Text(f"{self.arguments[wide.name]}.dtype") if wide else None,
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

    def _hint(self, node: Node, site: Site) -> str:
        """The name a person would give: the module that computed it, or the operand it is a view or update of."""
        op = node.op.partition(".")[2]
        operands = [self._hints[value.key] for value in _values(site.args)]
        part = _module_name(node.module)
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
        if op in ("linear", "addmm", "embedding", "matmul", "bmm", "mm"):
            return part or "product"
        if op == "add" and self._is_residual(node):
            return next((hint for hint in operands if hint in self.arguments.values()), operands[0])
        if op in ("mul", "add", "sub", "div") and len(operands) > 1:
            return part or operands[0]
        return operands[0] if operands else (part or op)

    def _is_residual(self, node: Node) -> bool:
        shapes = [self.graph.nodes[name].meta.shape for name in node.operands()]
        return len(shapes) == 2 and shapes[0] == shapes[1] == node.meta.shape


def _attention_names(graph: OpGraph) -> dict[str, str]:
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


def _logits_names(graph: OpGraph) -> dict[str, str]:
    """What cross-entropy reads first is called logits, whatever module made it."""
    losses = (node for node in graph.of("op") if node.op == "autopar.cross_entropy")
    return {node.operands()[0]: "logits" for node in losses if graph.nodes[node.operands()[0]].kind == "op"}


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
    return Call(_OWN_NUMBERS[plain.function], (*plain.arguments, ("axis", axes)))


def _module_name(module: str) -> str:
    parts = [part for part in module.split(".") if part and not part.isdigit()]
    if not parts:
        return ""
    name = re.sub(r"(?<!^c)(_proj|_layernorm|_layer_norm)$", "", parts[-1])
    return name if is_writable(name) else ""


def _action(action: str) -> str:
    return action.replace("_", "-")


def _amount(nbytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes} B"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
