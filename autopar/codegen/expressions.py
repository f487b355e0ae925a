"""Operators raised to what people write: for each canonical operator, from argument expressions to a `source` tree.

A renderer sees a node, its arguments with tensors replaced by expressions, and `Sizes`, which says what a size is on
this rank. An operator without a renderer of its own is called by its name in `torch.nn.functional` or `torch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from autopar.codegen.source import Argument, Binary, Call, Expr, Method, Text, Value, literal
from autopar.errors import UnsupportedError
from autopar.graph.ir import Node, Ref
from autopar.graph.size import BATCH, SEQ, Size, divide
from autopar.sharding.layout import Layout


@dataclass(frozen=True, slots=True)
class Sizes:
    """What sizes are on this rank. ``axes``: sizes of the model axes. ``symbols``: expressions of b and s (local in
    the batch, global in the sequence); asking for one that is missing raises UnsupportedError. ``double``: a float64
    job, which computes "float32" tensors in float64."""

    axes: Mapping[str, int]
    symbols: Mapping[Size, Expr]
    double: bool = False

    def ways(self, layout: Layout, dim: int) -> int:
        """In how many parts ``layout`` splits ``dim``."""
        parts = 1
        for axis in layout.splits(dim):
            parts *= self.axes[axis]
        return parts

    def expr(self, size: int | Size, parts: int = 1) -> Expr:
        """A global size over ``parts``, as an expression."""
        if isinstance(size, int):
            return literal(size // parts)
        total: Expr | None = None
        for (b, s), coefficient in size.terms:
            factors = [self._symbol(BATCH)] * b + [self._symbol(SEQ)] * s
            term: Expr | None = None
            for factor in factors:
                term = factor if term is None else Binary("*", term, factor)
            if term is None:
                term = literal(abs(coefficient))
            elif abs(coefficient) != 1:
                term = Binary("*", literal(abs(coefficient)), term)
            if total is None:
                total = term if coefficient > 0 else Binary("neg", term, term)
            else:
                total = Binary("+" if coefficient > 0 else "-", total, term)
        assert total is not None
        return total if parts == 1 else Binary("//", total, literal(parts))

    def _symbol(self, symbol: Size) -> Expr:
        if symbol not in self.symbols:
            raise UnsupportedError(
                f"no tensor at hand has a dim of size {symbol}: cannot write sizes that depend on it"
            )
        return self.symbols[symbol]


@dataclass(frozen=True, slots=True)
class Site:
    """One operator call to be written: the node, its arguments (expressions for tensors), the operands' global shapes,
    the output layout, and sizes."""

    node: Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: tuple[tuple[int | Size, ...], ...]
    output: Layout
    sizes: Sizes

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)


Renderer = Callable[[Site], Expr]
_EXPRESSION = Value | Text | Call | Method | Binary


def render(site: Site) -> Expr:
    """The call as a person would write it. Raises UnsupportedError for an operator nobody can call by name."""
    renderer = RENDERERS.get(site.node.op)
    return renderer(site) if renderer is not None else _by_name(site)


def argument(value: Any, sizes: Sizes) -> Expr:
    """An argument as an expression: tensors are expressions already."""
    if isinstance(value, _EXPRESSION):
        return value
    if isinstance(value, Size):
        return sizes.expr(value)
    if isinstance(value, tuple | list) and any(
        isinstance(v, Value | Text | Call | Method | Binary | Size) for v in value
    ):
        return _Tuple(tuple(argument(item, sizes) for item in value)).expr()
    return literal(value)


@dataclass(frozen=True, slots=True)
class _Tuple:
    items: tuple[Expr, ...]

    def expr(self) -> Expr:
        # A call without a name prints as a parenthesised tuple; a single item needs its comma.
        if len(self.items) == 1:
            return Call("", (self.items[0], Text("")))
        return Call("", self.items)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Value | Call | Method | Binary | Ref)


def _by_name(site: Site) -> Expr:
    namespace, _, name = site.node.op.partition(".")
    owner = next((f"{where}." for where, module in (("F", F), ("torch", torch)) if hasattr(module, name)), None)
    if namespace != "aten" or owner is None or name.startswith("_"):
        raise UnsupportedError(
            f"{site.node.op} (in {site.node.module or 'the model'}) has no public PyTorch function of that name, so it "
            "cannot be written into the emitted module"
        )
    arguments: list[Argument] = [argument(value, site.sizes) for value in site.args]
    arguments += [(key, argument(value, site.sizes)) for key, value in site.kwargs.items()]
    return Call(owner + name, tuple(arguments))


def _function(name: str, *keywords: str, defaults: tuple[Any, ...] = ()) -> Renderer:
    """``name(tensors..., keyword=value...)``: what is no tensor goes by keyword, in order, unless it is the default."""

    known = dict(zip(keywords, defaults, strict=False))

    def write(site: Site) -> Expr:
        tensors = [argument(value, site.sizes) for value in site.args if _is_tensor(value)]
        rest = [value for value in site.args if not _is_tensor(value) and value is not None]
        pairs = {**dict(zip(keywords, rest, strict=False)), **site.kwargs}
        kept = {key: value for key, value in pairs.items() if key not in known or known[key] != value}
        return Call(name, (*tensors, *((key, argument(value, site.sizes)) for key, value in kept.items())))

    return write


def _method(name: str) -> Renderer:
    def write(site: Site) -> Expr:
        head, *rest = site.args
        arguments: list[Argument] = [argument(value, site.sizes) for value in rest]
        arguments += [(key, argument(value, site.sizes)) for key, value in site.kwargs.items()]
        return Method(argument(head, site.sizes), name, tuple(arguments))

    return write


def _binary(operator: str) -> Renderer:
    def write(site: Site) -> Expr:
        if site.kwargs.get("alpha", 1) != 1 or site.kwargs.get("rounding_mode"):
            return _by_name(site)
        left, right = (argument(value, site.sizes) for value in site.args[:2])
        return Binary(operator, left, right)

    return write


def _linear(site: Site) -> Expr:
    return Call("F.linear", tuple(argument(a, site.sizes) for a in site.args if a is not None))


def _addmm(site: Site) -> Expr:
    bias, x, weight = (argument(a, site.sizes) for a in site.args[:3])
    if site.kwargs:
        return _by_name(site)
    return Binary("+", Binary("@", x, weight), bias)


def _attention(site: Site) -> Expr:
    tensors = [argument(a, site.sizes) for a in site.args[:3]]
    mask = site.arg(3, "attn_mask")
    pairs: list[Argument] = []
    if mask is not None:
        pairs.append(("attn_mask", argument(mask, site.sizes)))
    dropout = site.arg(4, "dropout_p", 0.0)
    if dropout:
        pairs.append(("dropout_p", Text(f"{dropout} if self.training else 0.0")))
    if site.arg(5, "is_causal", False):
        pairs.append(("is_causal", literal(True)))
    query, key_shape = site.shapes[0], site.shapes[1]
    scale = site.arg(6, "scale")
    if scale is not None and scale != query[-1] ** -0.5:  # type: ignore[operator]
        pairs.append(("scale", literal(scale)))
    if site.arg(7, "enable_gqa", False) and query[-3] != key_shape[-3]:
        pairs.append(("enable_gqa", literal(True)))
    return Call("F.scaled_dot_product_attention", (*tensors, *pairs))


def _norm(name: str) -> Renderer:
    def write(site: Site) -> Expr:
        shape, weight = site.arg(1, "normalized_shape"), site.arg(2, "weight")
        bias = site.arg(3, "bias") if name == "layer_norm" else None
        eps = site.arg(4 if name == "layer_norm" else 3, "eps")
        arguments: list[Argument] = [argument(site.args[0], site.sizes), literal(shape)]
        for key, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                arguments.append(argument(value, site.sizes) if key == "weight" or weight is not None else (key, value))
        if eps is not None:
            arguments.append(("eps", literal(eps)))
        return Call(f"F.{name}", tuple(arguments))

    return write


def _embedding(site: Site) -> Expr:
    weight, ids = (argument(value, site.sizes) for value in site.args[:2])
    padding = site.arg(2, "padding_idx", -1)
    row: list[Argument] = [("padding_idx", literal(padding))] if padding >= 0 else []  # gets no gradient
    return Call("F.embedding", (ids, weight, *row))


def _cross_entropy(site: Site) -> Expr:
    return Call("cross_entropy", _logits_and_labels(site))


def _logits_and_labels(site: Site) -> tuple[Argument, ...]:
    logits, labels = (argument(value, site.sizes) for value in site.args[:2])
    ignore = site.arg(2, "ignore", -100)
    return (logits, labels) if ignore == -100 else (logits, labels, ("ignore", literal(ignore)))


def _cast(site: Site) -> Expr:
    x, dtype = argument(site.args[0], site.sizes), site.arg(1, "dtype")
    if dtype == "float32":
        return Method(x, "double" if site.sizes.double else "float")
    if dtype == "compute":
        return Method(x, "to", (Value("dtype"),))
    shorthand = {"int64": "long", "int32": "int", "bool": "bool", "float64": "double"}
    return Method(x, shorthand[dtype]) if dtype in shorthand else Method(x, "to", (Text(f"torch.{dtype}"),))


def _unflatten(site: Site) -> Expr:
    x, dim, given = site.args[0], site.args[1], list(site.args[2])
    local = [site.sizes.ways(site.output, dim + place) for place in range(len(given))]
    # The free entry is the one that is split or symbolic, so that no local size is written down.
    free = [p for p, size in enumerate(given) if size == -1 or local[p] > 1 or isinstance(size, Size)]
    entries: list[Expr] = []
    whole = site.node.meta.shape[dim : dim + len(given)]
    chosen = next((p for p in free if local[p] > 1 or isinstance(whole[p], Size)), free[0] if free else 0)
    for place, size in enumerate(whole):
        entries.append(literal(-1) if place == chosen else site.sizes.expr(size, local[place]))
    return Method(argument(x, site.sizes), "unflatten", (literal(dim), _Tuple(tuple(entries)).expr()))


def _reshape(site: Site) -> Expr:
    x = argument(site.args[0], site.sizes)
    shape = site.node.meta.shape
    entries: list[Expr] = []
    free = False
    for dim, size in enumerate(shape):
        parts = site.sizes.ways(site.output, dim)
        if isinstance(size, int) and parts == 1:
            entries.append(literal(size))
        elif not free:
            entries.append(literal(-1))
            free = True
        else:
            entries.append(site.sizes.expr(size, parts))
    return Method(x, "reshape", tuple(entries))


def _expand(site: Site) -> Expr:
    source = (*[None] * (len(site.node.meta.shape) - len(site.shapes[0])), *site.shapes[0])
    entries: list[Expr] = []
    for dim, (old, new) in enumerate(zip(source, site.node.meta.shape, strict=True)):
        entries.append(literal(-1) if old == new else site.sizes.expr(new, site.sizes.ways(site.output, dim)))
    return Method(argument(site.args[0], site.sizes), "expand", tuple(entries))


def _slice(site: Site) -> Expr:
    x, dim, start, end = site.args[:4]
    size = site.shapes[0][dim]
    length = end - start
    blocks = divide(size, length) if length != 0 else None
    if isinstance(blocks, int) and blocks > 1 and divide(start, length) is not None and size != length:
        # One of equal parts: right for the whole dim and for a slice of each part.
        part = divide(start, length)
        return Method(Method(argument(x, site.sizes), "chunk", (literal(blocks), literal(dim))), "[]", (literal(part),))
    left, right = _bound(start, size, site.sizes), _bound(end, size, site.sizes)
    text: list[Expr] = [Text(":")] * dim
    if isinstance(left, Text) and isinstance(right, Text):
        lower = "" if start == 0 else left.text
        upper = "" if end == size else right.text
        return Method(argument(x, site.sizes), "[]", (*text, Text(f"{lower}:{upper}")))
    return Method(argument(x, site.sizes), "narrow", (literal(dim), left, site.sizes.expr(end - start)))


def _bound(value: int | Size, size: int | Size, sizes: Sizes) -> Expr:
    """A slice bound, counted from the end where it is that many before it."""
    if not isinstance(value, int):
        behind = size - value
        if isinstance(behind, int):
            return literal(-behind)
    return sizes.expr(value)


def _select(site: Site) -> Expr:
    x, dim, index = site.args[:3]
    return Method(argument(x, site.sizes), "[]", (*[Text(":")] * dim, literal(index)))


def _index(site: Site) -> Expr:
    x, indices = site.args[:2]
    entries = [Text(":") if entry is None else argument(entry, site.sizes) for entry in indices]
    return Method(argument(x, site.sizes), "[]", tuple(entries))


def _concatenate(site: Site) -> Expr:
    tensors, dim = site.args[0], site.arg(1, "dim", 0)
    return Call("torch.cat", (_Tuple(tuple(argument(t, site.sizes) for t in tensors)).expr(), ("dim", literal(dim))))


def _factory(name: str) -> Renderer:
    """Tensors made of nothing: on the stage's device."""

    def write(site: Site) -> Expr:
        arguments: list[Argument] = [argument(value, site.sizes) for value in site.args]
        dtype = site.node.meta.dtype
        if dtype == "compute":
            arguments.append(("dtype", Value("dtype")))
        elif dtype == "float32":
            arguments.append(("dtype", Text("torch.float64" if site.sizes.double else "torch.float32")))
        elif dtype != "int64" or name == "torch.zeros":
            arguments.append(("dtype", Text(f"torch.{dtype}")))
        return Call(name, (*arguments, ("device", Value("device"))))

    return write


def _pow(site: Site) -> Expr:
    x, power = (argument(value, site.sizes) for value in site.args[:2])
    return Method(x, "pow", (power,)) if isinstance(power, Text) else Binary("**", x, power)


def _reduce(name: str) -> Renderer:
    def write(site: Site) -> Expr:
        dims, keep = site.arg(1, "dim"), site.arg(2, "keepdim", False)
        arguments: list[Argument] = []
        if dims is not None and dims != ():
            single = dims[0] if isinstance(dims, tuple) and len(dims) == 1 else dims
            arguments.append(literal(single))
        if keep:
            arguments.append(("keepdim", literal(True)))
        return Method(argument(site.args[0], site.sizes), name, tuple(arguments))

    return write


def _dropout(site: Site) -> Expr:
    x, p, train = argument(site.args[0], site.sizes), site.arg(1, "p", 0.5), site.arg(2, "train", True)
    return Call("F.dropout", (x, literal(p), Text("self.training"))) if p and train else x


def _pad(site: Site) -> Expr:
    x, pads = argument(site.args[0], site.sizes), argument(site.args[1], site.sizes)
    mode, value = site.arg(2, "mode", "constant"), site.arg(3, "value")
    if mode != "constant":
        return Call("F.pad", (x, pads, ("mode", literal(mode))))
    if not value:
        return Call("F.pad", (x, pads))
    whole = site.node.meta.dtype.startswith("int")
    return Call("F.pad", (x, pads, ("value", literal(int(value) if whole else value))))


def _neg(site: Site) -> Expr:
    x = argument(site.args[0], site.sizes)
    return Binary("neg", x, x)


RENDERERS: dict[str, Renderer] = {
    "aten.linear": _linear,
    "aten.addmm": _addmm,
    "aten.scaled_dot_product_attention": _attention,
    "aten.rms_norm": _norm("rms_norm"),
    "aten.layer_norm": _norm("layer_norm"),
    "aten.embedding": _embedding,
    "aten.gelu": _function("F.gelu", "approximate", defaults=("none",)),
    "aten.silu": _function("F.silu"),
    "aten.relu": _function("F.relu"),
    "aten.softmax": _reduce("softmax"),
    "aten.dropout": _dropout,
    "autopar.rotary": _function("rotary"),
    "autopar.cross_entropy": _cross_entropy,
    "autopar.cast": _cast,
    "aten.add": _binary("+"),
    "aten.sub": _binary("-"),
    "aten.mul": _binary("*"),
    "aten.div": _binary("/"),
    "aten.matmul": _binary("@"),
    "aten.mm": _binary("@"),
    "aten.bmm": _binary("@"),
    "aten.eq": _binary("=="),
    "aten.ne": _binary("!="),
    "aten.lt": _binary("<"),
    "aten.gt": _binary(">"),
    "aten.le": _binary("<="),
    "aten.ge": _binary(">="),
    "aten.logical_and": _binary("&"),
    "aten.bitwise_and": _binary("&"),
    "aten.logical_or": _binary("|"),
    "aten.bitwise_or": _binary("|"),
    "aten.neg": _neg,
    "aten.pad": _pad,
    "aten.pow": _pow,
    "aten.mean": _reduce("mean"),
    "aten.sum": _reduce("sum"),
    "aten.cos": _method("cos"),
    "aten.sin": _method("sin"),
    "aten.rsqrt": _function("torch.rsqrt"),
    "aten.tanh": _function("torch.tanh"),
    "aten.sigmoid": _function("torch.sigmoid"),
    "aten.transpose": _method("transpose"),
    "aten.t": _method("t"),
    "aten.permute": _method("permute"),
    "aten.unsqueeze": _method("unsqueeze"),
    "aten.squeeze": _method("squeeze"),
    "aten.contiguous": _method("contiguous"),
    "aten.clone": _method("clone"),
    "aten.detach": _method("detach"),
    "aten.unflatten": _unflatten,
    "aten.flatten": _method("flatten"),
    "aten.reshape": _reshape,
    "aten.view": _reshape,
    "aten.expand": _expand,
    "aten.slice": _slice,
    "aten.select": _select,
    "aten.index": _index,
    "aten.cat": _concatenate,
    "aten.arange": _factory("torch.arange"),
    "aten.full": _factory("torch.full"),
    "aten.zeros": _factory("torch.zeros"),
    "aten.ones": _factory("torch.ones"),
}
