"""From a `torch.export` program to a `Draft` in canonical operators.

Removed here: asserts, aliases, copies, device moves, size queries; sub-graphs run under no_grad are inlined; calls that
return lists (split, chunk, unbind) become one view per item. Every dim is non-negative, every default dropped.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from autopar.errors import UnsupportedError
from autopar.graph.aliases import Change, change_of
from autopar.graph.complex_numbers import REAL
from autopar.graph.draft import Draft
from autopar.graph.exported import (
    OWN_OPERATOR,
    dtype_name,
    from_values,
    module_path,
    positive,
    rank_of,
    tupled,
    unknown_call,
)
from autopar.graph.formulas import FORMULAS
from autopar.graph.ir import COMPUTE, Node, Ref, TensorMeta
from autopar.graph.leaves import arguments_of
from autopar.graph.other_names import CASTS, LIKE, LISTS, NEW, OF_TWO, PROMOTING, RENAMED, SAME, SHAPED_AS
from autopar.graph.own_state import state_of, write_state
from autopar.graph.size import Size
from autopar.graph.sizes import SizeOfValuesError, Sizes
from autopar.graph.writing import written_back

DROPPED_ARGUMENTS = frozenset({"device", "pin_memory", "layout", "memory_format", "non_blocking", "copy"})
DIM_ARGUMENTS = frozenset({"dim", "dims", "dim0", "dim1", "start_dim", "end_dim"})


@dataclass(slots=True)
class Importer:
    """State of one import. ``names``: canonical full name of each parameter and buffer of the traced copy.

    ``changed``: full names of parameters and buffers that forward changes, and which they are. ``outer``: the nodes of
    the program's own graph, not of graphs inside it. ``values``: what is imported of each node.
    """

    sizes: Sizes
    names: Mapping[str, str]
    trainable: Callable[[str], bool]
    draft: Draft = field(default_factory=Draft)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    outer: frozenset[torch.fx.Node] = frozenset()
    values: dict[torch.fx.Node, Any] = field(default_factory=dict)
    _leaves: dict[tuple[str, str], Ref] = field(default_factory=dict)

    def program(self, program: ExportedProgram, batch_keys: Sequence[str]) -> Draft:
        """Import the whole program; its one output is the loss."""
        keys = iter(batch_keys)
        inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        graph = program.graph_module.graph
        self.outer = frozenset(graph.nodes)
        for node in graph.nodes:
            if node.op == "placeholder":
                spec = inputs[node.name]
                if spec.kind == InputKind.USER_INPUT:
                    key = next(keys)
                    self._leaf(node, "input", key)
                elif spec.kind == InputKind.PARAMETER:
                    self._leaf(node, "parameter", self.names[spec.target or ""])
                elif spec.kind == InputKind.BUFFER:
                    self._leaf(node, "buffer", self.names[spec.target or ""])
                elif spec.kind == InputKind.CONSTANT_TENSOR:
                    self._leaf(node, "buffer", str(spec.target))
                    value = program.constants[str(spec.target)]
                    self.constants[str(spec.target)] = torch.view_as_real(value) if value.is_complex() else value
                else:
                    raise UnsupportedError(f"the model takes an input of kind {spec.kind.name} ({spec.target})")
        self._body(program.graph_module, no_grad=False)
        output = next(node for node in reversed(graph.nodes) if node.op == "output")
        (loss,) = output.args[0]
        if isinstance(refusal := self.values[loss], UnsupportedError):
            raise refusal
        self.draft.output = self.values[loss].name
        return self.draft

    def _leaf(self, node: torch.fx.Node, kind: str, target: str) -> None:
        if (kind, target) in self._leaves:
            self.values[node] = self._leaves[kind, target]
            return
        value = node.meta["val"]
        grad = kind == "parameter" and self.trainable(target)
        shape, dtype = self.sizes.shape(value), dtype_name(value.dtype)
        pairs = REAL.get(dtype) if kind == "buffer" else None
        meta = TensorMeta((*shape, 2) if pairs else shape, pairs or dtype, grad)
        ref = Ref(self.draft.add(Node(self.draft.fresh(node.name), kind, meta, target=target)))
        if pairs:  # complex numbers are kept as their parts
            ref = Ref(self.draft.emit("aten.view_as_complex", ref, shape=shape, dtype=dtype))
        self.values[node] = self._leaves[kind, target] = ref

    def _body(self, module: torch.fx.GraphModule, no_grad: bool) -> None:
        for node in module.graph.nodes:
            if node.op == "call_function":
                path = module_path(node)
                self.draft.module = self.draft.module if path is None else path
                try:
                    self._call(module, node, no_grad)
                except SizeOfValuesError as error:
                    self.values[node] = self._unknown(node, error)

    def _unknown(self, node: torch.fx.Node, error: SizeOfValuesError) -> UnsupportedError:
        """What stands for a value of unknown size, since a check may be all that reads it: told where it came up."""
        target = node.target
        name = target._schema.name.replace("::", ".") if isinstance(target, torch._ops.OpOverload) else ""
        told = error if error.placed else SizeOfValuesError(f"{self._place()} {from_values(name)}", placed=True)
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
            raise UnsupportedError(str(told)) from None
        return told

    def _call(self, module: torch.fx.GraphModule, node: torch.fx.Node, no_grad: bool) -> None:
        target, value = node.target, node.meta.get("val")
        if target is operator.getitem:
            source, index = node.args
            found = self.values[source]  # type: ignore[index]
            self.values[node] = found if isinstance(found, UnsupportedError) else found[index]
        elif str(target) == "wrap_with_set_grad_enabled":
            enabled, body, *operands = node.args
            self._inline(module, node, body, operands, no_grad=not enabled)
        elif str(target) == "wrap_with_autocast":
            _, dtype, enabled, _, body, *operands = node.args
            if enabled:
                raise UnsupportedError(f"{self._place()} enters autocast({dtype}); cast explicitly instead")
            self._inline(module, node, body, operands, no_grad)
        elif isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
            try:
                self.values[node] = self.sizes.read(value)
            except SizeOfValuesError as error:
                self.values[node] = error  # where nothing but an assertion uses it, it does not matter
        elif value is None or isinstance(value, torch.SymBool | bool):
            return  # an assertion: its truth was part of tracing
        elif isinstance(value, torch.SymFloat | float):
            raise UnsupportedError(f"{self._place()} computes a number from the batch or sequence size at run time")
        elif isinstance(target, torch._ops.OpOverload):
            self._operator(node, target, value, no_grad)
        else:
            raise UnsupportedError(f"{self._place()} {unknown_call(target)}")

    def _inline(
        self, module: torch.fx.GraphModule, node: torch.fx.Node, body: Any, operands: Sequence[Any], no_grad: bool
    ) -> None:
        inner = getattr(module, body.target)
        places = (n for n in inner.graph.nodes if n.op == "placeholder")
        for place, operand in zip(places, operands, strict=True):
            self.values[place] = self.values[operand] if isinstance(operand, torch.fx.Node) else operand
        self._body(inner, no_grad)
        output = next(n for n in reversed(inner.graph.nodes) if n.op == "output")
        self.values[node] = tuple(self.values[item] if item is not None else None for item in output.args[0])

    def _operator(self, node: torch.fx.Node, target: torch._ops.OpOverload, value: Any, no_grad: bool) -> None:
        op = target._schema.name.replace("::", ".")
        name = op.removeprefix("aten.")
        change = None
        if target._schema.is_mutable:
            change = change_of(node, self._given)
            state = state_of(node, self) if change is None else None
            if change is None and state is None:
                raise UnsupportedError(
                    f"{self._place()} changes in place ({op}) a parameter, a buffer, or one of several tensors "
                    "split from another; write it out of place, or do it outside of forward"
                )
            name = name.removesuffix("_")
        args, kwargs = self._arguments(node, target)
        if no_grad and not self._is_its_operand(name, args, value, node):
            args, kwargs = self._detached(args), self._detached(kwargs)
        if op == "autopar.leaf":
            leaf, _, call = node.args
            args, kwargs = arguments_of(call, list(args[1]))  # type: ignore[arg-type]
            shape, dtype = self.sizes.shape(value), dtype_name(value.dtype)
            self.values[node] = Ref(self.draft.emit(str(leaf), *args, shape=shape, dtype=dtype, options=kwargs))
        elif name in SAME:
            self.values[node] = args[0]
        elif name in CASTS:
            self.values[node] = self.draft.cast(args[0], dtype_name(value.dtype))
        elif name in LIKE and "dtype" in kwargs:
            made = Ref(self.draft.emit(f"aten.{name}", *args, shape=self.sizes.shape(value)))
            self.values[node] = self.draft.cast(made, dtype_name(value.dtype))
        elif name in LISTS:
            self.values[node] = self._items(args, node, target, value)
        elif name in FORMULAS:
            self.values[node] = FORMULAS[name](self.draft, *args, **kwargs)
        elif name == "topk":
            self.values[node] = self._largest(args, value)
        elif name == "sort":
            self.values[node] = self._sorted(args, kwargs, value)
        elif name in ("max", "min") and len(args) > 1 and isinstance(args[1], int):
            self.values[node] = self._extreme(name, args, value)
        elif op == "autopar.recurrent":
            self.values[node] = self._recurrent(args, value)
        elif not isinstance(value, torch.Tensor):
            refusal = UnsupportedError(
                f"{self._place()} uses {op}, which returns several tensors; autopar has no form for it: make what uses "
                f"it {OWN_OPERATOR}, or its module a leaf (autopar.leaf)"
            )
            self.values[node] = (refusal,) * len(value)  # a check may be all that reads them
        elif name == "copy":
            shape = self.sizes.shape(value)
            self.values[node] = self._expanded(self.draft.cast(args[1], dtype_name(value.dtype)), shape)
        elif name in SHAPED_AS:
            shape = self.sizes.shape(value)
            self.values[node] = Ref(self.draft.emit(f"aten.{SHAPED_AS[name]}", args[0], shape, shape=shape))
        elif name in NEW:
            self.values[node] = self._filled(args[2] if name == "new_full" else NEW[name], value)
        elif change and name in ("fill", "zero"):
            self.values[node] = self._filled(args[1] if name == "fill" else 0, value)
        else:
            name = OF_TWO.get(f"{name}.{target._overloadname}", RENAMED.get(name, name))
            shape, dtype = self.sizes.shape(value), dtype_name(value.dtype)
            op = f"aten.{name}" if op.startswith("aten.") else op
            # Changed in place, a tensor keeps its dtype; the operator by itself may give a wider one.
            wide = [self.draft.meta(arg).dtype for arg in args if isinstance(arg, Ref)] if change else []
            own = "float32" if name in PROMOTING and dtype == COMPUTE and "float32" in wide else dtype
            result = Ref(self.draft.emit(op, *args, shape=shape, dtype=own, options=kwargs))
            self.values[node] = self.draft.cast(result, dtype)
        if change is not None:
            self._write(node, change)
        elif target._schema.is_mutable and state is not None:
            write_state(node, state, self)

    def _given(self, node: torch.fx.Node) -> bool:
        """Whether ``node`` is a tensor of the batch: what is changed of it is seen by what reads it later."""
        value = self.values.get(node)
        return node.op == "placeholder" and isinstance(value, Ref) and self.draft.nodes[value.name].kind == "input"

    def _largest(self, args: tuple[Any, ...], value: Sequence[torch.Tensor]) -> list[Ref]:
        """The values and the indices of `topk`: an operator for the indices, and the values they pick."""
        x, count = args[:2]
        dim = (args[2] if len(args) > 2 else -1) % len(self.draft.shape(x))
        largest, shape = len(args) < 4 or args[3], self.sizes.shape(value[1])
        options = {} if largest else {"largest": False}
        index = Ref(self.draft.emit("autopar.topk", x, count, dim, shape=shape, dtype="int64", options=options))
        return [self._picked(x, dim, index, value[0]), index]

    def _sorted(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Sequence[torch.Tensor]) -> list[Ref]:
        """The values and the indices of `sort`: those of `argsort`, and what they pick."""
        x, *rest = args
        dim = kwargs.get("dim", rest[0] if rest else -1) % max(len(self.draft.shape(x)), 1)
        descending = kwargs.get("descending", rest[1] if len(rest) > 1 else False)
        shape = self.sizes.shape(value[1])
        index = Ref(
            self.draft.emit("aten.argsort", x, dim, *((True,) if descending else ()), shape=shape, dtype="int64")
        )
        return [self._picked(x, dim, index, value[0]), index]

    def _extreme(self, name: str, args: tuple[Any, ...], value: Sequence[torch.Tensor]) -> list[Ref]:
        """The values and the indices of `max` or `min` along a dim."""
        x, dim, keep = args[0], args[1], args[2:] == (True,)
        shape = list(self.draft.shape(x))
        shape[dim] = 1
        index = Ref(self.draft.emit(f"aten.arg{name}", x, dim, True, shape=shape, dtype="int64"))
        picked = self._picked(x, dim, index, value[0])
        if keep:
            return [picked, index]
        return [self.draft.squeeze(result, dim) for result in (picked, index)]

    def _picked(self, x: Ref, dim: int, index: Ref, value: torch.Tensor) -> Ref:
        """What ``index`` picks of ``x`` along a dim, in the dtype of ``value``."""
        shape, dtype = self.draft.shape(index), dtype_name(value.dtype)
        return Ref(self.draft.emit("aten.gather", x, dim, index, shape=shape, dtype=dtype))

    def _recurrent(self, args: tuple[Any, ...], values: Sequence[torch.Tensor]) -> list[Ref]:
        """The results of a recurrent layer, each by an operator that takes all it takes, and which result."""
        kind, x, states, weights, biases, layers, bidirectional, batch_first = args
        held = states if kind == "lstm" else states[0]
        given = (x, held, weights, biases, layers, 0.0, True, bidirectional, batch_first)
        return [
            Ref(self.draft.emit(f"autopar.{kind}", *given, index, shape=self.sizes.shape(value)))
            for index, value in enumerate(values)
        ]

    def _filled(self, number: Any, value: torch.Tensor) -> Ref:
        """A tensor like ``value`` full of ``number``, or of the number that a constant tensor holds."""
        shape, dtype = self.sizes.shape(value), dtype_name(value.dtype)
        if isinstance(number, Ref):
            leaf = self.draft.nodes[number.name]
            constant = self.constants.get(leaf.target) if leaf.kind == "buffer" else None
            if constant is None or constant.numel() != 1:
                return self._expanded(self.draft.cast(number, dtype), shape)
            number = constant.item()
        return Ref(self.draft.emit("aten.full", shape, number, shape=shape, dtype=dtype, options={"dtype": dtype}))

    def _write(self, node: torch.fx.Node, change: Change) -> None:
        """Make the value of in-place operator ``node`` that of the tensor it changes, of what that is a view of, and
        of the other views of the same."""
        value: Ref = self.values[node]
        for view in reversed(change.way[1:]):
            self.values[view] = value
            target = view.target
            assert isinstance(target, torch._ops.OpOverload)
            args, _ = self._arguments(view, target)
            whole = written_back(view, args, value, self.draft)
            if whole is None:
                raise UnsupportedError(
                    f"{self._place()} changes in place ({node.target}) a part of a tensor taken by {target}, which "
                    "autopar cannot write back; write it out of place"
                )
            value = whole
        self.values[change.way[0]] = value
        for view in change.views:
            target = view.target
            assert isinstance(target, torch._ops.OpOverload)
            if target._schema.is_mutable:
                self.values[view] = self.values[view.args[0]]  # type: ignore[index]
            else:
                self._operator(view, target, view.meta["val"], no_grad=False)

    def _arguments(self, node: torch.fx.Node, target: torch._ops.OpOverload) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword-only arguments in the operator's own order, trailing defaults dropped."""
        args: list[Any] = []
        defaults: list[Any] = []
        kwargs: dict[str, Any] = {}
        rank = rank_of(node)
        for place, argument in enumerate(target._schema.arguments):
            default = argument.default_value
            value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name, default)
            if argument.name in DROPPED_ARGUMENTS:
                continue
            value = self._value(value)
            counts = target._schema.name == "aten::tile"  # its "dims" say how often
            if argument.name in DIM_ARGUMENTS and not counts and rank is not None and value is not None:
                extra = target._schema.name in ("aten::unsqueeze", "aten::stack")
                value = positive(value, rank + extra)
            if argument.kwarg_only:
                if value != default:
                    kwargs[argument.name] = value
            else:
                args.append(value)
                defaults.append(default if argument.has_default_value() else ...)
        while args and defaults[-1] is not ... and args[-1] == tupled(defaults[-1]):
            args.pop()
            defaults.pop()
        return tuple(args), kwargs

    def _value(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            if isinstance(found := self.values[value], UnsupportedError):
                raise found
            return found
        if isinstance(value, torch.dtype):
            return dtype_name(value)
        if isinstance(value, Mapping):
            return {key: self._value(item) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(self._value(item) for item in value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise UnsupportedError(f"{self._place()} passes {value!r} to an operator; autopar has no form for it")

    def _is_its_operand(self, name: str, args: tuple[Any, ...], value: Any, node: torch.fx.Node) -> bool:
        """Whether an operator gives back the very tensor it is given: what reads it later, where gradients flow again,
        is seen as reading the result."""
        if name == "dropout":
            return args[1:2] == (0.0,) or args[2:3] == (False,)
        if (
            name not in ("to", "type_as", "contiguous")
            or dtype_name(value.dtype) != self.draft.meta(args[0].name).dtype
        ):
            return False
        given = node.args[0]
        return isinstance(given, torch.fx.Node) and bool(given.meta["val"].stride() == value.stride())

    def _detached(self, value: Any) -> Any:
        if isinstance(value, Ref):
            meta = self.draft.meta(value)
            if not meta.requires_grad:
                return value
            return Ref(self.draft.emit("aten.detach", value, shape=meta.shape))
        if isinstance(value, tuple):
            return tuple(self._detached(item) for item in value)
        if isinstance(value, dict):
            return {key: self._detached(item) for key, item in value.items()}
        return value

    def _items(self, args: tuple[Any, ...], node: torch.fx.Node, target: Any, values: Sequence[Any]) -> list[Ref]:
        """The items of a split: slices, or selections from one unflatten when the pieces are equal."""
        if target._schema.name in ("aten::broadcast_tensors", "aten::meshgrid"):
            pairs = [(tensor, self.sizes.shape(value)) for tensor, value in zip(args[0], values, strict=True)]
            if target._schema.name == "aten::meshgrid":
                swapped = "xy" in args[1:] or node.kwargs.get("indexing") == "xy"
                pairs = [
                    (self._along(tensor, place, len(pairs), swapped), s) for place, (tensor, s) in enumerate(pairs)
                ]
            return [self._expanded(tensor, shape) for tensor, shape in pairs]
        x: Ref = args[0]
        names = [argument.name for argument in target._schema.arguments]
        dim = dict(zip(names, args, strict=False)).get("dim", 0)
        if target._schema.name == "aten::unbind":
            return [self.draft.select(x, dim, index) for index in range(len(values))]
        sizes = [self.sizes.read(value.shape[dim]) for value in values]
        if len(set(sizes)) == 1 and len(sizes) > 1:
            blocks = self.draft.unflatten(x, dim, (len(sizes), sizes[0]), free=1)
            return [self.draft.select(blocks, dim, index) for index in range(len(sizes))]
        ends: list[int | Size] = [0]
        for size in sizes:
            ends.append(ends[-1] + size)
        return [self.draft.slice(x, dim, start, end) for start, end in pairwise(ends)]

    def _along(self, x: Ref, place: int, count: int, swapped: bool) -> Ref:
        """A tensor of one dim as the ``place``-th of ``count`` dims of a grid; ``swapped``: the first two in turn."""
        place = 1 - place if swapped and place < 2 else place
        for dim in range(count):
            if dim != place:
                x = self.draft.unsqueeze(x, min(dim, len(self.draft.shape(x))))
        return x

    def _expanded(self, x: Ref, shape: tuple[int | Size, ...]) -> Ref:
        return x if self.draft.shape(x) == shape else self.draft.expand(x, shape)

    def _place(self) -> str:
        return f"module {self.draft.module!r}" if self.draft.module else "the model"


def promoting_buffers(draft: Draft) -> frozenset[str]:
    """Float32 buffers that meet half-precision tensors without a cast, so that the result is float32."""
    feeding: dict[str, frozenset[str]] = {}
    found: frozenset[str] = frozenset()
    for node in draft.nodes.values():
        if node.kind == "buffer":
            feeding[node.name] = frozenset({node.target}) if node.meta.dtype == "float32" else frozenset()
            continue
        operands = node.operands()
        if (
            node.op != "autopar.cast"
            and node.meta.dtype == "float32"
            and {draft.meta(name).dtype for name in operands} >= {COMPUTE, "float32"}
        ):
            wide = (name for name in operands if draft.meta(name).dtype == "float32" and name in draft.constant)
            found = found.union(*(feeding.get(name, frozenset()) for name in wide))
        if node.name in draft.constant:
            feeding[node.name] = frozenset().union(*(feeding.get(name, frozenset()) for name in operands))
    return found
