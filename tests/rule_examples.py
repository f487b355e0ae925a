"""Small graphs written by hand, for the tests of the sharding algebra."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from autopar.graph.ir import Node, OpGraph, Ref, TensorMeta, substitute
from autopar.graph.ops import callable_of
from autopar.graph.size import Size
from autopar.sharding.rules.elementwise import broadcast
from autopar.sharding.rules.entry import Entry


def tensor(text: str, dtype: str = "compute", grad: bool = True) -> TensorMeta:
    """``tensor("b s 4096")``: sizes are numbers or expressions in b and s such as ``b*s``."""
    shape = tuple(Size.parse(part) for part in text.split())
    return TensorMeta(shape, dtype, grad and dtype in ("compute", "float32"))


class Build:
    """Builds an `OpGraph` node by node; every method returns a `Ref` to the new node."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def leaf(self, name: str, text: str, kind: str = "input", dtype: str = "compute", grad: bool = True) -> Ref:
        self.nodes[name] = Node(name, kind, tensor(text, dtype, grad), target=name)
        return Ref(name)

    def op(self, op: str, *args: Any, out: str, dtype: str = "compute", name: str = "", **kwargs: Any) -> Ref:
        name = name or f"{op.partition('.')[2]}_{len(self.nodes)}"
        node = Node(name, "op", tensor(out, dtype), op, args, kwargs)
        grad = any(self.nodes[operand].meta.requires_grad for operand in node.operands())
        self.nodes[name] = Node(name, "op", tensor(out, dtype, grad), op, args, kwargs)
        return Ref(name)

    def graph(self, *outputs: Ref) -> OpGraph:
        return OpGraph(dict(self.nodes), tuple(ref.name for ref in outputs))


def attention_block(heads: int = 4, kv_heads: int = 2, head: int = 4, hidden: int = 16, ffn: int = 32) -> OpGraph:
    """A Llama decoder layer: RMS norms, grouped-query attention with rotary embedding, SwiGLU."""
    g = Build()
    x = g.leaf("x", f"b s {hidden}")
    cos = g.leaf("cos", f"1 1 s {head}", grad=False)
    sin = g.leaf("sin", f"1 1 s {head}", grad=False)
    names = {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
    w = {n: g.leaf(f"{n}_proj", f"{size} {hidden}", "parameter") for n, size in names.items()}
    o = g.leaf("o_proj", f"{hidden} {heads * head}", "parameter")
    gate, up = (g.leaf(n, f"{ffn} {hidden}", "parameter") for n in ("gate_proj", "up_proj"))
    down = g.leaf("down_proj", f"{hidden} {ffn}", "parameter")
    n1, n2 = (g.leaf(n, f"{hidden}", "parameter") for n in ("input_norm", "post_norm"))
    full = f"b s {hidden}"
    h = g.op("aten.rms_norm", x, (hidden,), n1, 1e-5, out=full, name="norm1")
    parts = {}
    for n, size in names.items():
        count = size // head
        y = g.op("aten.linear", h, w[n], out=f"b s {size}", name=n)
        y = g.op("aten.unflatten", y, 2, (count, head), out=f"b s {count} {head}", name=f"{n}_heads")
        y = g.op("aten.transpose", y, 1, 2, out=f"b {count} s {head}", name=f"{n}_t")
        if n != "v":
            y = g.op("autopar.rotary", y, cos, sin, out=f"b {count} s {head}", name=f"{n}_rotary")
        parts[n] = y
    a = g.op(
        "aten.scaled_dot_product_attention",
        *parts.values(),
        None,
        0.0,
        True,
        enable_gqa=True,
        out=f"b {heads} s {head}",
        name="attention",
    )
    a = g.op("aten.transpose", a, 1, 2, out=f"b s {heads} {head}", name="merge_t")
    a = g.op("aten.flatten", a, 2, 3, out=f"b s {heads * head}", name="merge")
    a = g.op("aten.linear", a, o, out=full, name="o")
    x = g.op("aten.add", x, a, out=full, name="residual1")
    h = g.op("aten.rms_norm", x, (hidden,), n2, 1e-5, out=full, name="norm2")
    g1 = g.op("aten.silu", g.op("aten.linear", h, gate, out=f"b s {ffn}", name="gate"), out=f"b s {ffn}", name="silu")
    u1 = g.op("aten.linear", h, up, out=f"b s {ffn}", name="up")
    m = g.op("aten.mul", g1, u1, out=f"b s {ffn}", name="mul")
    d = g.op("aten.linear", m, down, out=full, name="down")
    return g.graph(g.op("aten.add", x, d, out=full, name="residual2"))


@dataclass(frozen=True)
class T:
    """A tensor argument of an example: its shape, and what its values are.

    ``kind``: "real", "positive", "unit" (inside 0..1), "mask" (booleans, no row of the last dim all false), "marks"
    (booleans, ``high`` true along dim 1), "index" below ``high``, or "places", indices that differ along the last dim.
    """

    shape: tuple[int, ...]
    kind: str = "real"
    high: int = 0

    def value(self, generator: torch.Generator) -> torch.Tensor:
        if self.kind == "mask":
            drawn = torch.rand(self.shape, generator=generator) > 0.4
            if self.shape:
                drawn[..., 0] = True
            return drawn
        if self.kind == "marks":
            ranks = torch.rand(self.shape[:2], generator=generator).argsort(1).argsort(1)
            return (ranks < self.high).view(*self.shape[:2], 1).expand(self.shape)
        if self.kind == "index":
            return torch.randint(0, self.high, self.shape, generator=generator)
        if self.kind == "places":  # all different along the last dim
            wide = torch.rand((*self.shape[:-1], self.high), generator=generator).argsort(-1)
            return wide[..., : self.shape[-1]]
        if self.kind == "unit":
            return 0.1 + 0.8 * torch.rand(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "complex":
            return torch.randn(self.shape, generator=generator, dtype=torch.complex128)
        drawn = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return drawn.abs() + 0.5 if self.kind == "positive" else drawn

    @property
    def meta(self) -> TensorMeta:
        kinds = {"mask": "bool", "marks": "bool", "index": "int64", "places": "int64", "complex": "complex128"}
        dtype = kinds.get(self.kind, "compute")
        return TensorMeta(self.shape, dtype, dtype == "compute")


@dataclass(frozen=True)
class Example:
    """One call of an operator on concrete tensors."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0) -> tuple[Node, OpGraph, list[torch.Tensor]]:
        """The call as a node of a graph, and the values of its operands (float64)."""
        generator = torch.Generator().manual_seed(seed)
        g, values = Build(), []

        def place(value: Any) -> Any:
            if isinstance(value, T):
                name = f"x{len(values)}"
                g.nodes[name] = Node(name, "input", value.meta, target=name)
                values.append(value.value(generator))
                return Ref(name)
            return tuple(place(item) for item in value) if isinstance(value, tuple | list) else value

        args, kwargs = place(self.args), {key: place(value) for key, value in self.kwargs.items()}
        drawn = iter(values)
        out = callable_of(self.op)(*fill(args, drawn), **fill(kwargs, drawn))
        dtype = "compute" if out.is_floating_point() else str(out.dtype).removeprefix("torch.")
        grad = dtype == "compute" and any(x.is_floating_point() for x in values)
        g.nodes["y"] = Node("y", "op", TensorMeta(tuple(out.shape), dtype, grad), self.op, args, kwargs)
        return g.nodes["y"], g.graph(Ref("y")), values

    def __str__(self) -> str:
        shapes = ",".join("x".join(map(str, a.shape)) if isinstance(a, T) else repr(a) for a in self.args)
        return f"{self.op}({shapes})".replace(" ", "")


def fill(value: Any, tensors: Any) -> Any:
    """``value`` with each `Ref` replaced by the next tensor."""
    return substitute(value, lambda _: next(tensors))


def _t(*shape: int) -> T:
    return T(shape)


def _index(high: int, *shape: int) -> T:
    return T(shape, "index", high)


def _places(high: int, *shape: int) -> T:
    return T(shape, "places", high)


_X = _t(4, 8, 16)
_CALLS: dict[str, list[tuple[Any, ...]]] = {
    "aten.linear": [(_X, _t(8, 16)), (_X, _t(8, 16), _t(8)), (_t(4, 8), _t(16, 8), _t(16)), (_t(8), _t(4, 8))],
    "aten.addmm": [(_t(12), _t(4, 8), _t(8, 12)), (_t(4, 12), _t(4, 8), _t(8, 12))],
    "aten.baddbmm": [(_t(4, 8, 12), _t(4, 8, 16), _t(4, 16, 12))],
    "aten.mm": [(_t(4, 8), _t(8, 12))],
    "aten.bmm": [(_t(4, 8, 16), _t(4, 16, 12))],
    "aten.mv": [(_t(4, 8), _t(8))],
    "aten.dot": [(_t(8), _t(8))],
    "aten.matmul": [
        (_t(2, 4, 8, 16), _t(2, 4, 16, 12)),
        (_t(2, 4, 8, 16), _t(1, 16, 12)),
        (_X, _t(16, 12)),
        (_X, _t(16)),
        (_t(8), _t(4, 8, 12)),
        (_t(8), _t(8)),
    ],
    "aten.cdist": [(_t(2, 4, 16), _t(2, 12, 16)), (_t(4, 16), _t(12, 16))],
    "aten.einsum": [
        ("bqd,bkd->bqk", (_t(4, 8, 16), _t(4, 12, 16))),
        ("...k, kn -> ...n", (_X, _t(16, 4))),
        ("ij,ij", (_t(4, 8), _t(4, 8))),
        ("ij,jk,kl->il", (_t(4, 8), _t(8, 12), _t(12, 4))),
        ("iij->ij", (_t(4, 4, 8),)),
        ("Bi,iK->BK", (_t(4, 8), _t(8, 4))),
    ],
    "aten.scaled_dot_product_attention": [
        (_t(4, 4, 8, 16), _t(4, 4, 12, 16), _t(4, 4, 12, 8)),
        (_t(4, 4, 8, 16), _t(4, 4, 8, 16), _t(4, 4, 8, 16), None, 0.0, True),
        (_t(4, 4, 8, 16), _t(4, 4, 8, 16), _t(4, 4, 8, 16), T((4, 1, 8, 8), "mask")),
        (_t(4, 4, 8, 16), _t(4, 4, 8, 16), _t(4, 4, 8, 16), _t(8, 8)),
        (_t(4, 4, 8, 16), _t(4, 4, 8, 16), _t(4, 4, 8, 16), _t(4, 8, 8)),
        (_t(4, 8, 16), _t(4, 8, 16), _t(4, 8, 16)),
    ],
    "autopar.rotary": [(_t(4, 4, 8, 6), T((1, 1, 8, 6)), T((1, 1, 8, 6))), (_t(4, 4, 8, 6), _t(8, 6), _t(8, 6))],
    "aten.rms_norm": [(_X, (16,), _t(16), 1e-5), (_X, (16,)), (_X, (8, 16), _t(8, 16))],
    "aten.layer_norm": [(_X, (16,), _t(16), _t(16), 1e-5), (_X, (16,), _t(16)), (_X, (16,))],
    "autopar.ctc_loss": [(_t(5, 4, 6), _index(5, 4, 3), _index(6, 4), _index(4, 4), 5, True)],
    "autopar.cross_entropy": [(_t(4, 8, 12), _index(12, 4, 8)), (_t(8, 16), _index(16, 8), 3)],
    "aten.embedding": [(_t(12, 8), _index(12, 4, 16)), (_t(12, 8), _index(12, 4)), (_t(12, 8), _index(12, 16), 3)],
    "aten.index_select": [(_X, 1, _index(8, 12))],
    "aten.index": [(_X, (None, _index(8, 4, 12))), (_t(8, 4), (_index(8, 12),))],
    "aten.masked_scatter": [
        (_X, T((4, 8, 1), "marks", 3), _t(12, 16)),
        (_X, T((4, 8, 1), "marks", 1), _t(4, 16)),
        (_X, T((4, 8, 16), "marks", 2), _t(8, 16)),
        (_X, T((4, 8, 16), "marks", 2), _t(4, 2, 16)),
    ],
    "aten.gather": [(_X, 1, _index(8, 4, 4, 16)), (_X, 2, _index(16, 4, 4, 8))],
    "aten.scatter": [
        (_X, 2, _index(16, 4, 8, 2), 1.0),
        (_t(4, 8), 1, _index(8, 2, 3), 0.0),
        (_X, 2, _places(16, 4, 8, 2), _t(4, 8, 2)),
    ],
    "aten.one_hot": [(_index(6, 4, 8), 6), (_index(6, 8), 8)],
    "aten._weight_norm": [(_t(8, 4, 6), _t(8, 1, 1)), (_t(4, 6, 8), _t(1, 1, 8), 2)],
    "aten.scatter_add": [
        (_X, 2, _index(16, 4, 8, 12), _t(4, 8, 12)),
        (_t(4, 8), 1, _index(8, 2, 4), _t(2, 4)),
        (_t(8), 0, _index(8, 16), _t(16)),
    ],
    "aten.index_add": [(_t(6, 8), 0, _index(6, 16), _t(16, 8)), (_X, 1, _index(8, 4), _t(4, 4, 16))],
    "aten.histc": [(_t(4, 8), 4, -1, 1), (_t(16), 6, 0, 2)],
    "autopar.topk": [(_X, 3, 2), (_X, 2, 1), (_X, 2, 2, False)],
    "aten.sum": [(_X, (1,), True), (_X, (0, 2)), (_X,), (_X, 1)],
    "aten.mean": [(_X, (2,), True), (_X, 1), (_X,)],
    "aten.amax": [(_X, (2,), True), (_X, (0, 1))],
    "aten.amin": [(_X, (2,))],
    "aten.prod": [(_X, 2)],
    "aten.logsumexp": [(_X, (2,), True)],
    "aten.any": [(T((4, 8), "mask"), 1), (T((4, 8), "mask"),)],
    "aten.all": [(T((4, 8), "mask"), 1, True)],
    "aten.argmax": [(_X, 2), (_X, 1, True)],
    "aten.argmin": [(_X, 2)],
    "aten.argsort": [(_X, 2), (_X, 1, True)],
    "aten.linalg_vector_norm": [(_X, 2, (2,), True)],
    "aten.cumsum": [(_X, 1)],
    "aten.cumprod": [(_X, 1)],
    "aten.flip": [(_X, (1, 2))],
    "aten.roll": [(_X, (1,), (2,))],
    "aten.tril": [(_X,), (_X, 1)],
    "aten.triu": [(_X, -1)],
    "aten.view": [(_X, (4, 8, 4, 4)), (_X, (32, 16)), (_X, (4, 128)), (_t(4, 6), (3, 8)), (_t(8, 1, 12), (8, 12))],
    "aten.reshape": [
        (_X, (4, 4, 32)),
        (_t(12, 8), (8, 12)),
        (
            _t(
                24,
            ),
            (4, 6),
        ),
        (_t(4, 9, 4), (6, 6, 4)),
    ],
    "aten._unsafe_view": [(_X, (4, 8, 2, 8))],
    "aten.flatten": [(_X, 0, 1), (_X, 1, 2)],
    "aten.unflatten": [(_X, 2, (4, 4)), (_X, 2, (4, -1)), (_X, 0, (2, 2))],
    "aten.unsqueeze": [(_X, 1)],
    "aten.squeeze": [(_t(4, 1, 8), 1)],
    "aten.transpose": [(_X, 0, 2), (_X, 1, 2)],
    "aten.permute": [(_X, (2, 0, 1))],
    "aten.t": [(_t(4, 8),)],
    "aten.expand": [(_t(4, 1, 8), (4, 12, 8)), (_t(4, 1, 8), (8, 4, 12, -1)), (_t(8), (4, 8))],
    "aten.broadcast_to": [(_t(4, 1), (4, 8))],
    "aten.select": [(_X, 1, 3)],
    "aten.slice": [(_X, 2, 8, 16), (_X, 2, 4, 8), (_X, 2, 0, 16), (_X, 1, 1, 6), (_X, 2, 0, 12)],
    "aten.narrow": [(_X, 2, 8, 8), (_X, 1, 3, 4)],
    "aten.cat": [((_X, _X), 2), ((_X, _t(4, 4, 16)), 1), ((_X, _X, _X), 0), ((_X,), 0)],
    "aten.stack": [((_X, _X, _X, _X), 1), ((_t(4), _t(4)), 0)],
    "aten.repeat": [(_X, (1, 2, 1)), (_t(4, 8), (3, 1, 2))],
    "aten.repeat_interleave": [(_X, 2, 1)],
    "aten.constant_pad_nd": [(_X, (1, 2)), (_X, (0, 0, 1, 1), 0.0), (_X, (1, 1), 2.0)],
    "aten.pad": [(_X, (1, 2))],
    "aten.full": [((4, 8), 2.5)],
    "aten.zeros": [((4, 8),)],
    "aten.ones": [((4, 8),)],
    "aten.arange": [(8,)],
    "aten.scalar_tensor": [(1.5,)],
    "aten.eye": [(8,)],
    "aten.linspace": [(0.0, 1.0, 8)],
    "aten.where": [
        (T((4, 8, 16), "mask"), _X, _X),
        (T((8, 1), "mask"), _X, _t(16)),
        (T((4, 8, 16), "mask"), _X, 0.0),
        (T((4, 8, 16), "mask"), _X, 1.0),
        (T((4, 8, 16), "mask"), 0.0, _X),
    ],
    "aten.masked_fill": [(_X, T((8, 16), "mask"), 0.0), (_X, T((4, 8, 1), "mask"), -1.0)],
    "aten.addcmul": [(_X, _X, _t(16))],
    "aten.addcdiv": [(_X, _X, T((16,), "positive"))],
    "aten.fft_rfft": [(_X,), (_X, 32), (_X, None, 1)],
    **{
        f"aten.fft_{name}": [(T((4, 8, 16), "complex"),), (T((4, 8, 16), "complex"), 6, 1)]
        for name in ("fft", "ifft", "irfft")
    },
    **{
        f"aten.fft_{name}{dims}": [(T((4, 8, 16), "complex"),), (T((4, 8, 16), "complex"), (6,), (1,))][
            :: 1 + (dims == "2")
        ]
        for name in ("fft", "ifft", "irfft")
        for dims in ("2", "n")
    },
    **{f"aten.fft_rfft{dims}": [(_X,), (_X, None, (1, 2))] for dims in ("2", "n")},
    **{f"aten.{name}": [(T((4, 8, 16), "complex"),)] for name in ("real", "imag", "conj_physical")},
    "aten.smooth_l1_loss": [(_X, _X, 0), (_X, _X, 0, 0.5)],
    "aten.huber_loss": [(_X, _X, 0, 0.7)],
    "aten.kl_div": [(_X, T((4, 8, 16), "positive"), 0)],
    "aten.binary_cross_entropy": [(T((4, 8, 16), "unit"), T((4, 8, 16), "unit"), None, 0)],
    "aten.binary_cross_entropy_with_logits": [(_X, _X, None, None, 0)],
    "aten.lerp": [(_X, _X, 0.3), (_X, _X, _t(16))],
    "aten.dropout": [(_X, 0.5, False), (_X, 0.0, True)],
    "autopar.drawn": [(_X, "uniform"), (_X, "normal")],
    "aten.rsub": [(_X, _X), (_X, 1.0)],
    "aten.add": [(_X, _X), (_X, _t(8, 1)), (_X, 1.0), (_t(16), _X)],
    "aten.sub": [(_X, _X), (_X, 2.0)],
    "aten.mul": [(_X, _X), (_X, _t(16)), (_X, 2.0), (_t(4, 1, 1), _t(8, 1))],
    "aten.div": [(_X, T((4, 8, 16), "positive")), (_X, 2.0)],
    "aten.pow": [(_X, 2), (T((4, 8), "positive"), _t(8)), (2.0, _X)],
    "aten.clamp": [(_X, -0.5, 0.5)],
    "aten.clamp_min": [(_X, 0.1)],
    "aten.clamp_max": [(_X, 0.1)],
    "aten.full_like": [(_X, 3.0)],
    "aten.threshold": [(_X, 0.1, 0.0)],
    "aten.floor_divide": [(T((4, 8), "index", 90), 7)],
    "aten.gelu": [(_X,), (_X, "tanh")],
    "autopar.cast": [(_X, "float32"), (_X, "compute"), (_X, "int64"), (_X, "bool")],
}
_CALLS |= {
    "autopar.selective_scan": [(_t(4, 8, 5), T((4, 8, 5), "positive"), _t(8, 3), _t(4, 3, 5), _t(4, 3, 5))],
    "autopar.state_space_scan": [
        (_t(4, 6, 8, 4), T((4, 6, 8), "unit"), T((8,), "unit"), _t(4, 6, 2, 3), _t(4, 6, 2, 3), 4),
        (_t(4, 8, 4, 4), T((4, 8, 4), "unit"), T((4,), "unit"), _t(4, 8, 1, 3), _t(4, 8, 1, 3), 4),
    ],
}
_CALLS["autopar.gated_delta_rule"] = [
    (_t(4, 6, 2, 3), _t(4, 6, 2, 3), _t(4, 6, 4, 8), T((4, 6, 4), "unit"), T((4, 6, 4), "unit"), 4),
    (_t(4, 6, 4, 3), _t(4, 6, 4, 3), _t(4, 6, 4, 8), T((4, 6, 4, 3), "unit"), T((4, 6, 4), "unit"), 4),
]
_GATED = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_CALLS |= {
    f"autopar.{kind}": [
        (
            _t(4, 5, 3) if batch_first else _t(5, 4, 3),
            (_t(1, 4, 6), _t(1, 4, 6)) if kind == "lstm" else _t(1, 4, 6),
            (_t(gates * 6, 3), _t(gates * 6, 6), _t(gates * 6), _t(gates * 6)),
            *(True, 1, 0.0, True, False, batch_first, index),
        )
        for batch_first, index in ((True, 0), (False, 0), (True, 1))
    ]
    for kind, gates in _GATED.items()
}
_IMAGE, _WAVE = _t(4, 8, 6, 6), _t(4, 8, 12)
_CALLS |= {
    "aten.conv1d": [
        (_WAVE, _t(16, 8, 3), _t(16), (2,), (1,)),
        (_WAVE, _t(8, 1, 4), _t(8), (1,), (3,), (1,), 8),
        (_WAVE, _t(8, 2, 3), None, (1,), (0,), (1,), 4),
        (_t(8, 12), _t(4, 8, 3)),
    ],
    "aten.conv2d": [
        (_IMAGE, _t(12, 8, 2, 2), _t(12), (2, 2)),
        (_IMAGE, _t(4, 8, 3, 3), None, (1, 1), (1, 1)),
        (_IMAGE, _t(16, 2, 3, 3), _t(16), (1, 1), (1, 1), (1, 1), 4),
    ],
    "aten.conv3d": [(_t(4, 4, 4, 4, 4), _t(8, 4, 2, 2, 2), _t(8), (2, 2, 2))],
    "aten.conv_transpose1d": [(_WAVE, _t(8, 4, 2), _t(4), (2,))],
    "aten.conv_transpose2d": [
        (_IMAGE, _t(8, 4, 2, 2), _t(4), (2, 2)),
        (_IMAGE, _t(8, 3, 2, 2), None, (2, 2), (0, 0), (0, 0), 4),
    ],
    "aten.conv_transpose3d": [(_t(4, 4, 2, 2, 2), _t(4, 8, 2, 2, 2), _t(8))],
    "aten.max_pool1d": [(_WAVE, (2,), (2,))],
    "aten.max_pool2d": [(_IMAGE, (2, 2), (2, 2)), (_IMAGE, (3, 3), (2, 2), (1, 1))],
    "aten.max_pool3d": [(_t(4, 4, 4, 4, 4), (2, 2, 2))],
    "aten.avg_pool1d": [(_WAVE, (2,), (2,))],
    "aten.avg_pool2d": [(_IMAGE, (2, 2))],
    "aten.avg_pool3d": [(_t(4, 4, 4, 4, 4), (2, 2, 2))],
    "aten.adaptive_avg_pool1d": [(_WAVE, (4,))],
    "aten.adaptive_avg_pool2d": [(_IMAGE, (1, 1)), (_IMAGE, (3, 3))],
    "aten.adaptive_avg_pool3d": [(_t(4, 4, 4, 4, 4), (2, 2, 2))],
    "aten.upsample_nearest1d": [(_WAVE, (24,))],
    "aten.upsample_nearest2d": [(_IMAGE, (12, 12))],
    "aten.upsample_linear1d": [(_WAVE, (24,), False)],
    "aten.upsample_bilinear2d": [(_IMAGE, (12, 12), True)],
    "aten.upsample_bicubic2d": [(_IMAGE, (12, 12), True)],
    "aten.upsample_nearest3d": [(_t(4, 8, 4, 4, 4), (8, 8, 8))],
    "aten.upsample_trilinear3d": [(_t(4, 8, 4, 4, 4), (8, 8, 8), False)],
    "aten._upsample_nearest_exact1d": [(_WAVE, (24,))],
    "aten._upsample_nearest_exact2d": [(_IMAGE, (12, 12))],
    "aten._upsample_bilinear2d_aa": [(_IMAGE, (4, 4), False)],
    "aten._upsample_bicubic2d_aa": [(_IMAGE, (4, 4), False)],
    "aten.batch_norm": [(_IMAGE, _t(8), _t(8), 1e-5), (_WAVE, None, None, 1e-5), (_t(6, 8), _t(8), _t(8), 1e-5)],
    "aten.group_norm": [(_IMAGE, 4, _t(8), _t(8)), (_WAVE, 2)],
}
_CALLS |= {f"aten.{op}": [(_X, 2, False)] for op in ("_softmax", "_log_softmax")}
_CALLS |= {f"aten.{op}": [(_X, 2), (_X, 1)] for op in ("softmax", "log_softmax")}
_CALLS |= {f"aten.{op}": [(_X, (2,)), (_X, (0, 1), True)] for op in ("var", "std")}
_CALLS |= {f"aten.{op}": [(T((4, 8, 6), "unit"),)] for op in ("acos", "asin", "logit")}
_MASKS = "logical_not logical_and logical_or logical_xor bitwise_not bitwise_and bitwise_or bitwise_xor"
_CALLS |= {
    f"aten.{op}": [(T((4, 8), "mask"),) if op.endswith("not") else (T((4, 8), "mask"), T((8,), "mask"))]
    for op in _MASKS.split()
}
_CALLS |= {f"aten.bitwise_{side}_shift": [(_index(9, 4, 8), _index(3, 8))] for side in ("left", "right")}
_GQA = [
    Example(
        "aten.scaled_dot_product_attention",
        (_t(2, 8, 8, 4), _t(2, kv, 8, 4), _t(2, kv, 8, 4), None, 0.0, causal),
        {"enable_gqa": True},
    )
    for kv, causal in ((4, True), (2, False), (1, True))
]


def _mixture(gate: str, transposed: bool, biases: bool, **options: Any) -> Example:
    """4 experts of width 12, hidden states of 8."""
    rows = 12 if gate in ("none", "apart") else 24
    weights = (_t(4, 8, rows), _t(4, 12, 8)) if transposed else (_t(4, rows, 8), _t(4, 8, 12))
    added = (_t(4, rows), _t(4, 8)) if biases else ()
    if gate == "apart":
        added = (*(added or (None, None)), weights[0], *added[:1])
    args = (_t(4, 8, 8), _index(4, 4, 8, 2), _t(4, 8, 2), *weights, *added)
    return Example("autopar.experts", args, {"experts": 4, "gate": gate, "transposed": transposed, **options})


_MIXTURES = [
    _mixture("halves", False, False, activation="silu"),
    _mixture("pairs", True, True, activation="clamped_swish", alpha=1.702, limit=0.5),
    _mixture("halves", False, False, activation="clamped_silu", limit=0.5),
    _mixture("none", False, True, activation="relu2"),
    _mixture("apart", False, True, activation="gelu"),
    _mixture("apart", True, False, activation="silu"),
]


def examples_of(entry: Entry) -> list[Example]:
    """Calls that exercise an entry of the rule table: written above, or, for elementwise operators, made up here."""
    name = entry.op.partition(".")[2]
    if entry.op == "autopar.experts":
        return _MIXTURES
    if entry.op in _CALLS:
        found = [Example(entry.op, args) for args in _CALLS[entry.op]]
        return found + (_GQA if name == "scaled_dot_product_attention" else [])
    if entry.compute is not broadcast:
        return []
    for args in ((T((4, 8, 6), "positive"),), (T((4, 8, 6), "positive"), T((8, 1), "positive"))):
        try:
            Example(entry.op, args).build()
        except (RuntimeError, TypeError):
            continue
        return [Example(entry.op, args)]
    return []
