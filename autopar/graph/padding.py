"""Attention heads padded up to a multiple of the ranks that split them.

`padded` gives a model that computes the same loss and gradients, in which the number of heads of every attention
divides: weights and biases get zeros where they are used (`aten.pad`), and the shapes of what lies between follow.
Parameters keep their shapes and names.

Why nothing changes: an added head gets finite queries, keys and values (zeros, or what follows from zeros), and the
output projection multiplies what it returns by zero columns. Its result therefore adds nothing, its gradient is
zero times finite numbers, and the gradient of the added zeros themselves is dropped by the backward of the padding.

With grouped queries either key/value heads are added, each with its queries, or queries to every group, whichever
makes fewer heads. An attention is left alone where heads are not plainly followed from its projections to the one
behind it: heads mixed with each other (a norm over all of them), masks per head, values used elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autopar.graph.dispatch import dispatched
from autopar.graph.ir import BlockKind, ModelGraph, Node, OpGraph, Ref, substitute
from autopar.graph.size import Size

if TYPE_CHECKING:
    from autopar.plan import Plan

ATTENTION = "aten.scaled_dot_product_attention"
PAD = "aten.pad"

Shape = tuple[int | Size, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """Where heads sit in a tensor: dim ``dim`` is ``outer`` x ``count`` x ``inner`` elements, ``count`` of them what
    grows (heads, key/value heads or queries of a group)."""

    dim: int
    outer: int
    count: int
    inner: int

    @property
    def size(self) -> int:
        return self.outer * self.count * self.inner

    def grown(self, count: int) -> int:
        """The size of the dim with ``count`` in the place of what there was."""
        return self.outer * count * self.inner


class _Unclear(Exception):  # noqa: N818
    """The heads of an attention cannot be followed: it is left alone."""


def padded(model: ModelGraph, ranks: int) -> ModelGraph:
    """``model`` with every attention's heads raised to a multiple of ``ranks``; ``model`` itself where all divide, or
    none that does not can be padded. Padding twice is padding once."""
    if ranks == 1:
        return model
    kinds = {name: _padded_kind(kind, ranks) for name, kind in model.kinds.items()}
    if all(kinds[name] is kind for name, kind in model.kinds.items()):
        return model
    return replace(model, kinds=kinds)


def as_planned(plan: Plan, model: ModelGraph) -> ModelGraph:
    """The model that the decisions of ``plan`` are about: ``model``, which the plan was made for, with its heads padded
    as the plan says, and its experts divided. Whatever reads decisions reads them against this."""
    return padded(dispatched(model, plan.mesh.ep), plan.pad_heads)


def can_pad(model: ModelGraph, ranks: int) -> bool:
    """Whether some attention has heads that ``ranks`` do not divide, and that can be padded."""
    return padded(model, ranks) is not model


_cache: dict[tuple[int, int], tuple[BlockKind, BlockKind]] = {}


def _padded_kind(kind: BlockKind, ranks: int) -> BlockKind:
    """Found once for each graph object: what is known of a graph elsewhere is known by its identity."""
    found = _cache.get((id(kind), ranks))
    if found is None or found[0] is not kind:
        if len(_cache) >= 64:
            _cache.pop(next(iter(_cache)))
        found = _cache[id(kind), ranks] = (kind, _pad_all(kind, ranks))
    return found[1]


def _pad_all(kind: BlockKind, ranks: int) -> BlockKind:
    graph = kind.graph
    for node in list(graph.of("op")):
        if node.op != ATTENTION:
            continue
        chosen = _growth(node, graph, ranks)
        if chosen is None:
            continue
        grouped, count = chosen
        try:
            marks, weights = _Follow(graph, node, grouped).everything()
        except _Unclear:
            continue
        graph = _grow(graph, marks, weights, count)
    return kind if graph is kind.graph else replace(kind, graph=graph)


def _growth(node: Node, graph: OpGraph, ranks: int) -> tuple[bool, int] | None:
    """(Whether queries are added to every group, their new number), or (False, the new number of key/value heads).
    None where the heads divide, or are not ordinary ones."""
    query, key, value = (graph.nodes[name].meta.shape for name in node.operands()[:3])
    if len(query) != 4 or not isinstance(query[1], int) or not isinstance(key[1], int) or key[1] != value[1]:
        return None
    heads, kv = query[1], key[1]
    return None if heads % kv else growth(kv, heads // kv, ranks)


def growth(kv: int, group: int, ranks: int) -> tuple[bool, int] | None:
    """How ``kv`` key/value heads with ``group`` queries each grow for ``ranks``; see `_growth`."""
    if kv % ranks == 0 or group % ranks == 0:
        return None
    more_kv, more_group = -(-kv // ranks) * ranks, -(-group // ranks) * ranks
    if group > 1 and kv * more_group < more_kv * group:
        return True, more_group
    return (False, more_kv) if kv > 1 else None


_ALONG = ("mul", "div", "add", "sub", "neg", "clone", "contiguous", "dropout", "detach")
"""Elementwise operators, which heads pass through one by one."""


class _Follow:
    """Finds every tensor that holds the heads of one attention, and the weights that make or read them."""

    def __init__(self, graph: OpGraph, attention: Node, grouped: bool) -> None:
        self.graph, self.attention = graph, attention
        self.users = graph.users()
        self.marks: dict[str, Heads] = {}
        self.weights: dict[tuple[str, str], Heads] = {}
        self.grouped = grouped

    def everything(self) -> tuple[dict[str, Heads], dict[tuple[str, str], Heads]]:
        """Marks by node name, and of weights by (the linear layer, its weight or bias). Raises _Unclear."""
        query, key, value, *masks = self.attention.operands()
        heads, kv = self._size(query, 1), self._size(key, 1)
        for mask in masks:
            shape = self.graph.nodes[mask].meta.shape
            if len(shape) > 2 and shape[-3] != 1:
                raise _Unclear
        group = heads // kv
        own = Heads(1, kv, group, 1) if self.grouped else Heads(1, 1, kv, group)
        self._back(query, own)
        if not self.grouped:
            self._back(key, Heads(1, 1, kv, 1))
            self._back(value, Heads(1, 1, kv, 1))
        self._forward(self.attention.name, own)
        self._check_closed()
        return self.marks, self.weights

    def _size(self, name: str, dim: int) -> int:
        size = self.graph.nodes[name].meta.shape[dim]
        assert isinstance(size, int)
        return size

    def _mark(self, name: str, heads: Heads) -> None:
        """Raises _Unclear where the tensor holds no such heads, or other ones."""
        if self.graph.nodes[name].meta.shape[heads.dim] != heads.size or self.marks.setdefault(name, heads) != heads:
            raise _Unclear

    def _back(self, name: str, heads: Heads) -> None:
        """Follow the heads of ``name`` back to the linear layers that make them."""
        node = self.graph.nodes[name]
        if self.marks.get(name) == heads:
            return
        self._mark(name, heads)
        if node.op == "aten.linear":
            self._projection(node, heads)
            return
        for operand, held in self._operands(node, heads):
            self._back(operand, held)

    def _projection(self, node: Node, heads: Heads) -> None:
        """A linear layer that makes heads: rows of its weight, and elements of its bias."""
        if heads.dim != len(node.meta.shape) - 1:
            raise _Unclear
        _, *weights = node.operands()
        for weight in weights:
            self._weight(node.name, weight, replace(heads, dim=0))

    def _weight(self, linear: str, weight: str, heads: Heads) -> None:
        if self.weights.setdefault((linear, weight), heads) != heads:
            raise _Unclear

    def _operands(self, node: Node, heads: Heads) -> Iterator[tuple[str, Heads]]:
        """The operands that hold the heads of ``node``, and where. Raises _Unclear for an operator not known here."""
        if node.kind != "op":
            raise _Unclear
        name = node.op.partition(".")[2]
        x, dim = node.operands()[0], heads.dim
        shape = self.graph.nodes[x].meta.shape
        rotary = node.op == "autopar.rotary" and dim < len(shape) - 1
        if rotary or name in _ALONG or node.op == "autopar.cast":
            yield from self._broadcast(node, heads)
        elif name in ("rms_norm", "layer_norm") and dim < len(shape) - len(node.args[1]):
            yield x, heads
        elif name == "transpose":
            first, second = node.args[1:3]
            yield x, replace(heads, dim={first: second, second: first}.get(dim, dim))
        elif name == "permute":
            yield x, replace(heads, dim=node.args[1][dim])
        elif name == "unflatten":
            yield x, _before_unflatten(node, heads)
        elif name == "flatten":
            yield x, self._before_flatten(node, heads)
        elif name == "unsqueeze" and dim != node.args[1]:
            yield x, replace(heads, dim=dim - (dim > node.args[1]))
        elif name in ("select", "squeeze") and len(node.args) > 1:
            yield x, replace(heads, dim=dim + (dim >= node.args[1]))
        elif name == "slice":
            yield x, self._before_slice(node, heads)
        elif name == "expand" and len(shape) == len(node.meta.shape):
            if shape[dim] != 1:  # else all heads are one: there are more of them then
                yield x, heads
        elif name == "cat" and dim != node.args[1]:
            for operand in node.operands():
                yield operand, heads
        else:
            raise _Unclear

    def _broadcast(self, node: Node, heads: Heads) -> Iterator[tuple[str, Heads]]:
        back = len(node.meta.shape) - heads.dim
        for operand in node.operands():
            shape = self.graph.nodes[operand].meta.shape
            if len(shape) >= back and shape[-back] != 1:
                yield operand, replace(heads, dim=len(shape) - back)

    def _before_flatten(self, node: Node, heads: Heads) -> Heads:
        """A flattened dim must hold its heads in one of the dims that it was made of."""
        start, end = node.args[1:3]
        if heads.dim != start:
            return replace(heads, dim=heads.dim + (end - start) * (heads.dim > start))
        sizes = self.graph.nodes[node.operands()[0]].meta.shape[start : end + 1]
        for place, size in enumerate(sizes):
            majors, minors = _product(sizes[:place]), _product(sizes[place + 1 :])
            if heads.outer % majors == 0 and heads.inner % minors == 0:
                found = Heads(start + place, heads.outer // majors, heads.count, heads.inner // minors)
                if found.size == size:
                    return found
        raise _Unclear

    def _before_slice(self, node: Node, heads: Heads) -> Heads:
        """A slice of the dim of the heads must be one of equal parts, each with heads of its own."""
        _, dim, start, end = node.args
        if dim != heads.dim:
            return heads
        whole = self.graph.nodes[node.operands()[0]].meta.shape[dim]
        length = end - start
        if not isinstance(whole, int) or whole % length or start % length:
            raise _Unclear
        return replace(heads, outer=heads.outer * (whole // length))

    def _forward(self, name: str, heads: Heads) -> None:
        """Follow the heads of ``name`` to the linear layers that read them."""
        self._mark(name, heads)
        if name in self.graph.outputs:
            raise _Unclear
        for user in self.users[name]:
            node = self.graph.nodes[user]
            if node.op == "aten.linear":
                x, weight, *_ = node.operands()
                if x != name or weight == name or heads.dim != len(self.graph.nodes[x].meta.shape) - 1:
                    raise _Unclear
                self._weight(user, weight, replace(heads, dim=1))
            else:
                self._forward(user, self._after(node, name, heads))

    def _after(self, node: Node, name: str, heads: Heads) -> Heads:
        """Where the heads of operand ``name`` are in ``node``, which must read no other heads."""
        kind, dim = node.op.partition(".")[2], heads.dim
        if kind == "flatten":
            start, end = node.args[1:3]
            shape = self.graph.nodes[name].meta.shape
            if not start <= dim <= end:
                return replace(heads, dim=dim - (end - start) * (dim > end))
            return Heads(
                start,
                _product(shape[start:dim]) * heads.outer,
                heads.count,
                heads.inner * _product(shape[dim + 1 : end + 1]),
            )
        if kind == "transpose":
            first, second = node.args[1:3]
            return replace(heads, dim={first: second, second: first}.get(dim, dim))
        if kind == "permute":
            return replace(heads, dim=node.args[1].index(dim))
        if kind in _ALONG or node.op == "autopar.cast":
            back = len(self.graph.nodes[name].meta.shape) - dim
            after = replace(heads, dim=len(node.meta.shape) - back)
            if list(self._broadcast(node, after)) == [(name, heads)]:
                return after
        raise _Unclear

    def _check_closed(self) -> None:
        """Whatever reads a tensor with heads has been followed as well."""
        linears = {linear for linear, _ in self.weights}
        for name in self.marks:
            if name in self.graph.outputs:
                raise _Unclear
            for user in self.users[name]:
                if user not in self.marks and user != self.attention.name and user not in linears:
                    raise _Unclear
        # A weight that is itself made of heads, or read by one layer in two ways, is none of the known forms.
        if any(weight in self.marks for _, weight in self.weights):
            raise _Unclear


def _before_unflatten(node: Node, heads: Heads) -> Heads:
    dim, count = node.args[1], len(node.args[2])
    if not dim <= heads.dim < dim + count:
        return replace(heads, dim=heads.dim - (count - 1) * (heads.dim >= dim + count))
    shape = node.meta.shape
    outer, inner = _product(shape[dim : heads.dim]), _product(shape[heads.dim + 1 : dim + count])
    return Heads(dim, outer * heads.outer, heads.count, heads.inner * inner)


def _product(sizes: Shape) -> int:
    """Raises _Unclear where a size depends on batch or sequence."""
    total = 1
    for size in sizes:
        if not isinstance(size, int):
            raise _Unclear
        total *= size
    return total


def _grow(graph: OpGraph, marks: Mapping[str, Heads], weights: Mapping[tuple[str, str], Heads], count: int) -> OpGraph:
    """The graph with ``count`` heads where ``marks`` and ``weights`` say."""
    nodes: dict[str, Node] = {}
    made: dict[tuple[str, Heads], str] = {}

    def add(name: str, op: str, x: str, rest: tuple[Any, ...], shape: Shape, like: Node) -> str:
        while name in graph.nodes or name in nodes:
            name += "_"
        meta = replace(like.meta, shape=shape)
        nodes[name] = Node(name, "op", meta, op, (Ref(x), *rest), module=like.module)
        return name

    for node in graph.nodes.values():
        to: dict[str, str] = {}
        for (linear, weight), heads in weights.items():
            if linear == node.name:
                like = replace(graph.nodes[weight], module=node.module)
                if (weight, heads) not in made:
                    made[weight, heads] = _pad_weight(add, weight, heads, count, like)
                to[weight] = made[weight, heads]
        if to:
            args, kwargs = substitute((node.args, node.kwargs), _renaming(to))
            node = replace(node, args=args, kwargs=kwargs)
        nodes[node.name] = _grown(node, marks[node.name], count) if node.name in marks else node
    return OpGraph(nodes, graph.outputs)


def _renaming(to: Mapping[str, str]) -> Callable[[str], Ref]:
    return lambda name: Ref(to.get(name, name))


def _pad_weight(add: Callable[..., str], weight: str, heads: Heads, count: int, like: Node) -> str:
    """Add the operators that put zeros behind the heads of ``weight``; returns the name of the result."""
    dim, held, extra = heads.dim, heads.count * heads.inner, (count - heads.count) * heads.inner
    left, right = like.meta.shape[:dim], like.meta.shape[dim + 1 :]
    zeros = ((0, 0) * len(right) + (0, extra),)
    if heads.outer == 1:
        return add(f"{weight}_padded", PAD, weight, zeros, (*left, held + extra, *right), like)
    outer = heads.outer
    parts = add(f"{weight}_parts", "aten.unflatten", weight, (dim, (outer, -1)), (*left, outer, held, *right), like)
    more = add(f"{weight}_padded", PAD, parts, zeros, (*left, outer, held + extra, *right), like)
    whole = (*left, outer * (held + extra), *right)
    return add(f"{weight}_whole", "aten.flatten", more, (dim, dim + 1), whole, like)


def _grown(node: Node, heads: Heads, count: int) -> Node:
    """``node`` with its new shape, and the sizes among its arguments."""
    shape = list(node.meta.shape)
    shape[heads.dim] = heads.grown(count)
    args = node.args
    if node.op == "aten.unflatten":
        x, dim, sizes = args
        args = (x, dim, tuple(-1 if size == -1 else shape[dim + place] for place, size in enumerate(sizes)))
    elif node.op == "aten.expand":
        args = (args[0], tuple(shape))
    elif node.op == "aten.slice" and args[1] == heads.dim:
        x, dim, start, _ = args
        length = shape[dim]
        args = (x, dim, start // node.meta.shape[dim] * length, (start // node.meta.shape[dim] + 1) * length)
    return replace(node, meta=replace(node.meta, shape=tuple(shape)), args=args)
