"""Operators raised to what people write: for each canonical operator, from argument expressions to a `source` tree.

A renderer sees a node, its arguments with tensors replaced by expressions, and `Sizes`, which says what a size is on
this rank. An operator without a renderer of its own is called by its name in `torch.nn.functional` or `torch`, or as
`torch.ops` has it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from autopar.codegen.shape_expressions import SHAPES
from autopar.codegen.site import Renderer, Site, Sizes, argument, is_tensor
from autopar.codegen.source import Argument, Binary, Call, Expr, Method, Text, Value, literal
from autopar.graph.ir import CONVOLUTIONS, RECURRENT
from autopar.graph.leaves import LEAVES


def render(site: Site) -> Expr:
    """The call as a person would write it."""
    renderer = RENDERERS.get(site.node.op)
    return renderer(site) if renderer is not None else _by_name(site)


def _by_name(site: Site) -> Expr:
    arguments: list[Argument] = [argument(value, site.sizes) for value in site.args]
    for key, value in site.kwargs.items():
        named = key == "dtype" and isinstance(value, str)
        arguments.append((key, _dtype(value, site.sizes) if named else argument(value, site.sizes)))
    return Call(_public_name(site.node.op), tuple(arguments))


def _public_name(op: str) -> str:
    """What people call ``op``: a function of torch's if there is one of that name, else the operator itself."""
    namespace, _, name = op.partition(".")
    if op in LEAVES:
        return name
    if namespace != "aten" or name.startswith("_"):
        return f"torch.ops.{op}"
    family, _, rest = name.partition("_")
    homes = (("F", F, name), ("torch", torch, name), (f"torch.{family}", getattr(torch, family, None), rest))
    return next((f"{home}.{call}" for home, module, call in homes if call and hasattr(module, call)), f"torch.ops.{op}")


def _dtype(name: str, sizes: Sizes) -> Expr:
    if name == "compute":
        return Value("dtype")
    return Text("torch.float64" if name == "float32" and sizes.double else f"torch.{name}")


def _function(name: str, *keywords: str, defaults: tuple[Any, ...] = ()) -> Renderer:
    """``name(tensors..., keyword=value...)``: what is no tensor goes by keyword, in order, unless it is the default."""

    known = dict(zip(keywords, defaults, strict=False))

    def write(site: Site) -> Expr:
        tensors = [argument(value, site.sizes) for value in site.args if is_tensor(value)]
        rest = [value for value in site.args if not is_tensor(value) and value is not None]
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
    return (logits, labels) if ignore == -100 else (logits, labels, ("ignore", argument(ignore, site.sizes)))


def _experts(site: Site) -> Expr:
    """What is as most models have it is left out (`runtime.experts`)."""
    usual = {"gate": "halves", "transposed": False, "activation": "silu"}
    usual |= {key: site.kwargs[key] for key in ("experts", "ep") if key in site.kwargs}
    pairs = [(key, literal(value)) for key, value in site.kwargs.items() if usual.get(key) != value]
    tensors: list[Argument] = [argument(value, site.sizes) for value in site.args[:5]]
    names = ("up_bias", "down_bias", "values", "values_bias")
    for place, (name, value) in enumerate(zip(names, site.args[5:], strict=False)):
        if value is not None:
            written = argument(value, site.sizes)
            tensors.append((name, written) if None in site.args[5 : 5 + place] else written)
    return Call("experts", (*tensors, *pairs))


def _topk(site: Site) -> Expr:
    x, count, dim = (argument(value, site.sizes) for value in site.args[:3])
    pairs = [(key, literal(value)) for key, value in site.kwargs.items()]
    return Method(Method(x, "topk", (count, dim, *pairs)), "[]", (literal(1),))


def _cast(site: Site) -> Expr:
    x, dtype = argument(site.args[0], site.sizes), site.arg(1, "dtype")
    if dtype == "float32":
        return Method(x, "double" if site.sizes.double else "float")
    if dtype == "compute":
        return Method(x, "to", (Value("dtype"),))
    shorthand = {"int64": "long", "int32": "int", "bool": "bool", "float64": "double"}
    return Method(x, shorthand[dtype]) if dtype in shorthand else Method(x, "to", (Text(f"torch.{dtype}"),))


def _factory(name: str) -> Renderer:
    """Tensors made of nothing: on the stage's device."""

    def write(site: Site) -> Expr:
        arguments: list[Argument] = [argument(value, site.sizes) for value in site.args]
        dtype = site.node.meta.dtype
        if dtype == "compute":
            arguments.append(("dtype", Value("dtype")))
        elif dtype == "float32":
            arguments.append(("dtype", Text("torch.float64" if site.sizes.double else "torch.float32")))
        elif dtype != "int64" or name in ("torch.zeros", "torch.ones"):
            arguments.append(("dtype", Text(f"torch.{dtype}")))
        return Call(name, (*arguments, ("device", Value("device"))))

    return write


def _pow(site: Site) -> Expr:
    x, power = (argument(value, site.sizes) for value in site.args[:2])
    return Method(x, "pow", (power,)) if isinstance(power, Text) else Binary("**", x, power)


def _convolution(site: Site) -> Expr:
    """Groups are counted of this rank: only they split the channels of a convolution that has several."""
    op = site.node.op.partition(".")[2]
    names = ("stride", "padding", *(("output_padding", "groups", "dilation") if "transpose" in op else ()))
    names = names if "transpose" in op else (*names, "dilation", "groups")
    usual = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
    tensors = [argument(value, site.sizes) for value in site.args[:3] if value is not None]
    pairs: list[Argument] = []
    for name, value in zip(names, site.args[3:], strict=False):
        if value == usual[name] or (isinstance(value, tuple) and set(value) == {usual[name]}):
            continue
        if name == "groups":
            rank = int(op[-2])
            value //= site.sizes.ways(site.output, len(site.node.meta.shape) - rank - 1)
        pairs.append((name, literal(value)))
    return Call(f"F.{op}", (*tensors, *pairs))


def _loss(name: str, *tensors: str, options: tuple[str, ...] = ()) -> Renderer:
    """The elements of a loss: two tensors, optional ones, the reduction, numbers."""

    def write(site: Site) -> Expr:
        first, second, *rest = site.args
        given = [*zip(tensors, rest, strict=False), *zip(options, rest[len(tensors) + 1 :], strict=False)]
        pairs = [(key, argument(value, site.sizes)) for key, value in given if value is not None]
        pairs += [(key, literal(value)) for key, value in site.kwargs.items()]
        both = (argument(x, site.sizes) for x in (first, second))
        return Call(f"F.{name}", (*both, *pairs, ("reduction", literal("none"))))

    return write


def _einsum(site: Site) -> Expr:
    equation, operands = site.args
    return Call("torch.einsum", (literal(equation), *(argument(x, site.sizes) for x in operands)))


def _ctc_loss(site: Site) -> Expr:
    *tensors, blank, zero_infinity = site.args
    given = [argument(value, site.sizes) for value in tensors]
    options = (("blank", literal(blank)), ("reduction", literal("none")), ("zero_infinity", literal(zero_infinity)))
    return Call("F.ctc_loss", (*given, *options))


def _recurrent(site: Site) -> Expr:
    *given, index = site.args
    name = site.node.op.partition(".")[2]
    return Method(Call(f"torch.{name}", tuple(argument(value, site.sizes) for value in given)), "[]", (literal(index),))


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


def _batch_norm(site: Site) -> Expr:
    x, weight, bias = (argument(value, site.sizes) for value in site.args[:3])
    given = (("weight", weight), ("bias", bias), ("training", literal(True)), ("eps", literal(site.args[3])))
    return Call("F.batch_norm", (x, literal(None), literal(None), *given))


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


FACTORIES = ("arange", "eye", "full", "linspace", "ones", "scalar_tensor", "tril_indices", "triu_indices", "zeros")
"""Operators that make a tensor of numbers alone."""

RENDERERS: dict[str, Renderer] = {
    "aten.linear": _linear,
    "aten.addmm": _addmm,
    "aten.scaled_dot_product_attention": _attention,
    "aten.rms_norm": _norm("rms_norm"),
    "aten.layer_norm": _norm("layer_norm"),
    "aten.batch_norm": _batch_norm,
    "aten.embedding": _embedding,
    "aten.gelu": _function("F.gelu", "approximate", defaults=("none",)),
    "aten.silu": _function("F.silu"),
    "aten.relu": _function("F.relu"),
    "aten.softmax": _reduce("softmax"),
    "aten.dropout": _dropout,
    "autopar.drawn": _function("drawn", "kind"),
    "autopar.rotary": _function("rotary"),
    "autopar.angle_table": _factory("angle_table"),
    "autopar.sinusoids": _factory("sinusoids"),
    "autopar.gated_delta_rule": _function("gated_delta_rule", "chunk"),
    "autopar.selective_scan": _function("selective_scan"),
    "autopar.state_space_scan": _function("state_space_scan", "chunk"),
    "autopar.cross_entropy": _cross_entropy,
    "autopar.cast": _cast,
    "autopar.experts": _experts,
    "autopar.topk": _topk,
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
    "aten.einsum": _einsum,
    "aten.smooth_l1_loss": _loss("smooth_l1_loss", options=("beta",)),
    "aten.huber_loss": _loss("huber_loss", options=("delta",)),
    "aten.kl_div": _loss("kl_div"),
    "aten.binary_cross_entropy": _loss("binary_cross_entropy", "weight"),
    "aten.binary_cross_entropy_with_logits": _loss("binary_cross_entropy_with_logits", "weight", "pos_weight"),
    **dict.fromkeys(RECURRENT, _recurrent),
    "autopar.ctc_loss": _ctc_loss,
    "aten.pad": _pad,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
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
    "aten.flatten": _method("flatten"),
    **{f"aten.{name}": _factory(f"torch.{name}") for name in FACTORIES},
} | SHAPES
