"""A graph under construction: what the passes of the front end read and rebuild.

A pass never edits in place. `rewrite` walks the nodes in order into a new `Draft`; a rule sees a node whose operands
are already rewritten and either emits its replacement or leaves it. Patterns therefore look backwards from their last
node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autopar.graph.ir import COMPUTE, Node, OpGraph, Ref, TensorMeta, map_refs
from autopar.graph.size import Size

FLOATING = frozenset({COMPUTE, "float64", "float32", "float16", "bfloat16", "complex64", "complex128"})
"""Dtypes of tensors that gradients flow through."""
_RANDOM = (
    "dropout rand randn rand_like randn_like randint randint_like randperm bernoulli uniform normal normal_functional "
    "exponential multinomial"
)
RANDOM = frozenset(f"aten.{name}" for name in _RANDOM.split()) | {"autopar.drawn"}
"""Operators that give other numbers each time."""


@dataclass(slots=True)
class Draft:
    """Nodes by name in execution order. ``module`` of a node is a path in the whole model here.

    ``constant`` holds the names of nodes that depend on no parameter and no batch data.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    output: str = ""
    constant: set[str] = field(default_factory=set)
    module: str = ""
    _seen: dict[str, str] = field(default_factory=dict)
    _taken: frozenset[str] = frozenset()

    def add(self, node: Node) -> str:
        """Append a node, or return the equal node that is there, from the same call of the same module."""
        operands = node.operands()
        constant = node.kind == "buffer" or (
            node.kind == "op" and node.op not in RANDOM and all(name in self.constant for name in operands)
        )
        if node.kind == "op" and node.op not in RANDOM:
            key = repr((node.op, node.args, node.kwargs, node.meta.shape, node.module))
            if key in self._seen:
                return self._seen[key]
            self._seen[key] = node.name
        if constant:
            self.constant.add(node.name)
        self.nodes[node.name] = node
        return node.name

    def emit(
        self,
        op: str,
        *args: Any,
        shape: Sequence[int | Size],
        dtype: str | None = None,
        module: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Append operator ``op`` with keyword arguments ``options``; dtype defaults to the first operand's."""
        node = Node("", "op", TensorMeta(()), op, args, dict(options or {}))
        operands = node.operands()
        dtype = dtype or self.meta(operands[0]).dtype
        grad = dtype in FLOATING and op != "aten.detach" and any(self.meta(name).requires_grad for name in operands)
        meta = TensorMeta(tuple(shape), dtype, grad)
        name = self.fresh(op.partition(".")[2])
        return self.add(replace(node, name=name, meta=meta, module=self.module if module is None else module))

    def fresh(self, stem: str) -> str:
        """An unused node name that begins with ``stem``."""
        number = len(self.nodes)
        while (name := f"{stem}__{number}") in self.nodes or name in self._taken:
            number += 1
        return name

    def meta(self, name: str | Ref) -> TensorMeta:
        return self.nodes[name.name if isinstance(name, Ref) else name].meta

    def shape(self, name: str | Ref) -> tuple[int | Size, ...]:
        return self.meta(name).shape

    def broadcast(self, x: Ref, y: Ref) -> tuple[int | Size, ...]:
        """The shape that two tensors have together."""
        longer, shorter = sorted((self.shape(x), self.shape(y)), key=len, reverse=True)
        shorter = (1,) * (len(longer) - len(shorter)) + tuple(shorter)
        return tuple(b if a == 1 else a for a, b in zip(longer, shorter, strict=True))

    def producer(self, value: Any, op: str | Iterable[str]) -> Node | None:
        """The node ``value`` refers to, if it is operator ``op`` (or one of them)."""
        if not isinstance(value, Ref):
            return None
        node = self.nodes[value.name]
        wanted = (op,) if isinstance(op, str) else tuple(op)
        return node if node.kind == "op" and node.op in wanted else None

    def cast(self, x: Ref, dtype: str) -> Ref:
        if self.meta(x).dtype == dtype:
            return x
        return Ref(self.emit("autopar.cast", x, dtype, shape=self.shape(x), dtype=dtype))

    def transpose(self, x: Ref, first: int, second: int) -> Ref:
        shape = list(self.shape(x))
        first, second = sorted((first, second))
        if first == second:
            return x
        shape[first], shape[second] = shape[second], shape[first]
        if len(shape) == 2:
            return Ref(self.emit("aten.t", x, shape=shape))
        return Ref(self.emit("aten.transpose", x, first, second, shape=shape))

    def permute(self, x: Ref, order: Sequence[int]) -> Ref:
        shape = self.shape(x)
        return Ref(self.emit("aten.permute", x, tuple(order), shape=tuple([shape[dim] for dim in order])))

    def select(self, x: Ref, dim: int, index: int) -> Ref:
        shape = self.shape(x)
        return Ref(self.emit("aten.select", x, dim, index, shape=shape[:dim] + shape[dim + 1 :]))

    def slice(self, x: Ref, dim: int, start: int | Size, end: int | Size) -> Ref:
        shape = list(self.shape(x))
        if start == 0 and end == shape[dim]:
            return x
        shape[dim] = end - start
        return Ref(self.emit("aten.slice", x, dim, start, end, shape=shape))

    def squeeze(self, x: Ref, dim: int) -> Ref:
        shape = self.shape(x)
        return Ref(self.emit("aten.squeeze", x, dim, shape=shape[:dim] + shape[dim + 1 :]))

    def unsqueeze(self, x: Ref, dim: int) -> Ref:
        shape = self.shape(x)
        return Ref(self.emit("aten.unsqueeze", x, dim, shape=(*shape[:dim], 1, *shape[dim:])))

    def expand(self, x: Ref, shape: tuple[int | Size, ...]) -> Ref:
        return Ref(self.emit("aten.expand", x, shape, shape=shape))

    def pad(self, x: Ref, pads: tuple[Any, ...], value: float) -> Ref:
        """``pads``: (before, after) of the last dim, then of the one before it, as in `torch.nn.functional.pad`."""
        shape = list(self.shape(x))
        for place in range(len(pads) // 2):
            shape[-1 - place] = shape[-1 - place] + pads[2 * place] + pads[2 * place + 1]
        return Ref(self.emit("aten.pad", x, pads, "constant", float(value), shape=shape))

    def flatten(self, x: Ref, start: int, end: int) -> Ref:
        if start == end:
            return x
        shape = self.shape(x)
        product: int | Size = 1
        for size in shape[start : end + 1]:
            product = product * size
        return Ref(self.emit("aten.flatten", x, start, end, shape=(*shape[:start], product, *shape[end + 1 :])))

    def unflatten(self, x: Ref, dim: int, sizes: Sequence[int | Size], free: int = 0) -> Ref:
        """Split ``dim`` into ``sizes``; entry ``free`` is printed as -1."""
        shape = self.shape(x)
        written = tuple(-1 if place == free else size for place, size in enumerate(sizes))
        return Ref(self.emit("aten.unflatten", x, dim, written, shape=(*shape[:dim], *sizes, *shape[dim + 1 :])))

    def graph(self) -> OpGraph:
        return OpGraph(self.nodes, (self.output,))


Rule = Callable[[Node, Draft], Ref | None]


def rewrite(old: Draft, rules: Mapping[str, Sequence[Rule]]) -> tuple[Draft, bool]:
    """Rebuild ``old``, trying ``rules[op]`` on each operator; returns the live part and whether a rule fired."""
    # A new name must not be that of an old node that is still to come.
    new, names, fired = Draft(_taken=frozenset(old.nodes)), dict[str, str](), False
    for node in old.nodes.values():
        if node.kind != "op":
            names[node.name] = new.add(node)
            continue
        node = replace(
            node, args=map_refs(node.args, names.__getitem__), kwargs=map_refs(node.kwargs, names.__getitem__)
        )
        new.module = node.module
        for rule in rules.get(node.op, ()):
            replacement = rule(node, new)
            if replacement is not None:
                names[node.name], fired = replacement.name, True
                break
        else:
            names[node.name] = new.add(node)
    new.output = names[old.output]
    return live(new), fired


def live(draft: Draft) -> Draft:
    """Only the nodes that the output needs."""
    needed = {draft.output}
    for node in reversed(draft.nodes.values()):
        if node.name in needed:
            needed.update(node.operands())
    kept = {name: node for name, node in draft.nodes.items() if name in needed}
    return Draft(
        kept, draft.output, draft.constant & kept.keys(), "", {k: v for k, v in draft._seen.items() if v in kept}
    )
