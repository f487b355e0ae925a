"""The operators a drawn model is made of: each step reads a value and writes what it makes of it.

A step is right for a value where ``applies`` says so. None mixes samples, and none leaves a domain: arguments of
logarithms and roots are positive, and what is picked by size (maxima, topk) has no ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autopar.graph.size import SEQ
from fuzz.writing import Body, Dim, Value, of_batch, shape_text, swapped, text, without

Applies = Callable[[Body, Value], bool]


@dataclass(frozen=True)
class Step:
    name: str
    applies: Applies
    write: Callable[[Body, Value], object]


STEPS: dict[str, Step] = {}


def step(applies: Applies) -> Callable[[Callable[[Body, Value], object]], Callable[[Body, Value], object]]:
    """Puts a function among the steps."""

    def add(write: Callable[[Body, Value], object]) -> Callable[[Body, Value], object]:
        STEPS[write.__name__.rstrip("_")] = Step(write.__name__.rstrip("_"), applies, write)
        return write

    return add


def always(body: Body, x: Value) -> bool:
    return True


def featured(body: Body, x: Value) -> bool:
    """The last dim is of a fixed size."""
    return isinstance(x.last, int) and x.rank > 1


def deep(body: Body, x: Value) -> bool:
    """Two dims or more beside the samples."""
    return x.rank > 2


def rows(body: Body, x: Value) -> bool:
    """[b, n, d] with features."""
    return x.rank == 3 and isinstance(x.last, int)


def wide(body: Body, x: Value) -> bool:
    return bool(x.wide_dims())


UNARY = [
    "{x}.sin()",
    "F.gelu({x})",
    "F.silu({x})",
    "{x}.tanh()",
    "{x}.sigmoid()",
    "F.relu({x})",
    "{x}.square()",
    "-{x}",
    "{x}*0.5",
    "{x}+1.5",
    "1.0-{x}",
    "{x}/3.0",
    "{x}.abs()",
    "F.softplus({x})",
    "F.elu({x})",
    "F.leaky_relu({x},0.1)",
    "F.hardtanh({x},-1.5,1.5)",
    "F.mish({x})",
    "{x}.erf()",
    "{x}.cos()",
    "{x}.clamp(-2.0,2.0)",
    "{x}.clamp_min(0.1)",
    "({x}.square()+1.0).sqrt()",
    "({x}.abs()+0.5).log()",
    "({x}.square()+0.5).rsqrt()",
    "({x}.abs()+1.0).reciprocal()",
    "{x}.tanh().exp()",
    "{x}**2",
    "F.logsigmoid({x})",
    "{x}.sigmoid().logit()",
    "{x}.clone()",
    "{x}.float().sigmoid()",
    'F.gelu({x},approximate="tanh")',
    "F.selu({x})",
    "{x}.atan()",
    "{x}.tanh().expm1()",
    "{x}.square().log1p()",
    "F.hardswish({x})",
    "F.softsign({x})",
    "F.relu({x})**2",
    "{x}.detach().tanh()*{x}",
    "{x}.nan_to_num()",
    "torch.threshold({x},0.1,0.0)",
    "{x}.neg().exp2().log1p()",
    "{x}.round().detach()+{x}",
]


@step(always)
def unary(body: Body, x: Value) -> Value:
    return body.emit(body.pick(UNARY).format(x=x), *x.shape)


BINARY = [
    "{x}+{y}",
    "{x}*{y}",
    "{x}-{y}",
    "{y}-{x}",
    "{x}/({y}.abs()+1.0)",
    "torch.maximum({x},{y})",
    "torch.where({x}>{y},{x},{y}*0.5)",
    "torch.lerp({x},{y},0.3)",
    "torch.atan2({x},{y}.abs()+1.0)",
    "torch.hypot({x},{y}+3.0)",
    "torch.logaddexp({x},{y})",
    "torch.addcmul({x},{x},{y})",
    "({x}.abs()+0.5)**{y}.tanh()",
    "{x}*({y}>0.0)",
    "torch.minimum({y},{x})",
    "torch.addcdiv({x},{y},{x}.square()+1.0)",
]


@step(featured)
def binary(body: Body, x: Value) -> Value:
    return body.emit(body.pick(BINARY).format(x=x, y=body.partner(x)), *x.shape)


@step(lambda body, x: True)
def both(body: Body, x: Value) -> object:
    """Two values that are broadcast together: of one shape, or the other of size one along a dim."""
    fits = lambda y: y.rank == x.rank and all(a in (b, 1) for a, b in zip(y.shape, x.shape, strict=True))  # noqa: E731
    others = body.others(x, fits)
    if not others:
        return unary(body, x)
    return body.emit(body.pick(("{x}+{y}", "{x}*{y}", "{x}-{y}")).format(x=x, y=body.pick(others[::-1])), *x.shape)


@step(featured)
def linear(body: Body, x: Value) -> Value:
    n = body.width()
    made = body.members.module(f"Linear({x.last}, {n}{body.pick(('', ', bias=False'))})")
    return body.emit(f"{made}({x})", *x.shape[:-1], n)


@step(featured)
def product(body: Body, x: Value) -> Value:
    """A matrix or a vector of parameters."""
    n = body.width()
    if x.rank > 2 and body.pick((False, False, True)):
        return body.emit(f"{x} @ {body.members.parameter(x.last)}", *x.shape[:-1])
    matrix = body.members.parameter(x.last, n)
    forms = [f"{x} @ {matrix}", f"torch.matmul({x}, {matrix})", f"F.linear({x}, {matrix}.t())"]
    if x.rank == 3:
        forms += [f'torch.einsum("bid,dn->bin", {x}, {matrix})', f'torch.einsum("bid,dn->bni", {x}, {matrix})']
    form = body.pick(forms)
    shape = (x.shape[0], n, x.shape[1]) if "bni" in form else (*x.shape[:-1], n)
    return body.emit(form, *shape)


@step(deep)
def gram(body: Body, x: Value) -> Value:
    """Products of a tensor with itself: over its last dim, or the one before it."""
    lead, m, n = x.shape[:-2], x.shape[-2], x.shape[-1]
    y = body.pick([x, *body.others(x, lambda y: y.shape == x.shape)])
    forms: list[tuple[str, tuple[Dim, ...]]] = [
        (f"{x} @ {y}.transpose(-1, -2)", (m, m)),
        (f"{x}.transpose(-1, -2) @ {y}", (n, n)),
    ]
    if x.rank == 3:
        forms += [
            (f"torch.bmm({x}, {y}.transpose(1, 2))", (m, m)),
            (f'torch.einsum("bid,bjd->bij", {x}, {y})', (m, m)),
            (f'torch.einsum("bid,bie->bde", {x}, {y})', (n, n)),
            (f'torch.einsum("bid,bid->bi", {x}, {y})', (m,)),
        ]
    form, tail = body.pick(forms)
    return body.emit(f"({form}) * 0.3", *lead, *tail)


@step(deep)
def mixed(body: Body, x: Value) -> object:
    """Weights over one dim, from a softmax, applied to another value."""
    others = body.others(x, lambda y: y.rank == x.rank and y.shape[:-2] == x.shape[:-2] and y.shape[-2] == x.last)
    if not others:
        return gram(body, x)
    y = body.pick(others[::-1])
    weights = body.aside(f"{x}.softmax(-1)", *x.shape)
    return body.emit(f"{weights} @ {y}", *x.shape[:-1], y.last)


@step(featured)
def norm(body: Body, x: Value) -> Value:
    count = 2 if x.rank > 2 and isinstance(x.shape[-2], int) and body.pick((False, False, True)) else 1
    shape = x.shape[-count:]
    many = x.shape[-1] != 1 or count == 2
    forms = [f"F.layer_norm({x}, ({shape_text(shape)},))", f"F.rms_norm({x}, ({shape_text(shape)},))"] if many else []
    kinds = ["LayerNorm({})", "RMSNorm({})", "LayerNorm({}, bias=False)"] if many else ["RMSNorm({})"]
    size = f"({shape_text(shape)})" if count > 1 else text(shape[0])
    forms = [f"{body.members.module(body.pick(kinds).format(size))}({x})", *forms, f"F.normalize({x}, dim=-1)"]
    return body.emit(body.pick(forms), *x.shape)


@step(always)
def softmax(body: Body, x: Value) -> Value:
    dims = x.own_dims()
    if not dims:
        return unary(body, x)  # type: ignore[return-value]
    dim = body.pick(dims[::-1])
    forms = ("{x}.softmax({d})", "F.log_softmax({x}, {d})", "{x}.float().softmax({d}).to({x}.dtype)")
    return body.emit(body.pick(forms).format(x=x, d=dim), *x.shape)


REDUCTIONS = ("sum", "mean", "amax", "logsumexp", "var", "std", "amin", "norm", "prod")


@step(deep)
def reduce(body: Body, x: Value) -> Value:
    """A reduction over one dim; what picks by size has its ties broken first, a product is of a few numbers."""
    op = body.pick(REDUCTIONS)
    dims = x.own_dims()
    if op == "prod":
        dims = [dim for dim in dims if isinstance(x.shape[dim], int)]
    if op in ("var", "std"):
        dims = [dim for dim in dims if x.shape[dim] != 1]
    if not dims:
        op, dims = "sum", x.own_dims()
    dim, keep = body.pick(dims[::-1]), body.pick((False, True))
    source = f"{x}"
    if op in ("amax", "amin", "prod", "norm", "std") and isinstance(x.last, int):
        source = f"({x} + {body.members.parameter(x.last)})"
    shape = swapped(x.shape, dim, 1) if keep else without(x.shape, dim)
    tail = ", keepdim=True" if keep else ""
    if op == "norm":
        return body.emit(f"torch.linalg.vector_norm({source}, dim={dim}{tail})", *shape)
    if op == "std":
        return body.emit(f"({source}.var({dim}{tail}) + 0.1).sqrt()", *shape)
    return body.emit(f"{source}.{op}({dim}{tail})", *shape)


@step(lambda body, x: body.writes(SEQ) and rows(body, x))
def attention(body: Body, x: Value) -> Value:
    """Heads, grouped or not, of one fused projection or of three; masks that are causal, given, or none."""
    heads, group, size = body.pick((2, 4, 1, 3, 6)), body.pick((1, 2, 4)), body.pick((2, 4, 3))
    n, kv = x.shape[1], heads
    heads = heads * group
    fused = group == 1 and body.pick((False, True))
    bias = body.pick(("", ", bias=False"))
    if fused:
        made = body.members.module(f"Linear({x.last}, {3 * heads * size}{bias})")
        whole = body.aside(f"{made}({x})", x.shape[0], n, 3 * heads * size)
        parts = (f"{whole}.chunk(3, -1)", f"{whole}.split({heads * size}, -1)")
        names = [f"{whole.name}_{part}" for part in "qkv"]
        form = body.pick((*parts, f"{whole}.unflatten(-1, (3, {heads * size})).unbind(2)"))
        body.lines.append(f"{', '.join(names)} = {form}")
    else:
        names = []
        for count in (heads, kv, kv):
            made = body.members.module(f"Linear({x.last}, {count * size}{bias})")
            names.append(body.aside(f"{made}({x})", x.shape[0], n, count * size).name)
    q, k, v = (
        body.aside(f"{name}.unflatten(-1, ({count}, {size})).transpose(1, 2)", x.shape[0], count, n, size)
        for name, count in zip(names, (heads, kv, kv), strict=True)
    )
    if size % 2 == 0 and body.writes(n) and body.pick((False, False, True)):
        body.used.append("rotary")
        q, k = (body.aside(f"rotary({y})", *y.shape) for y in (q, k))
    options, mask = [""], ""
    if body.writes(n):
        options += ["causal", "bool", "bias", "window", "manual"]
    kind = body.pick([*options[1:], ""])
    count = text(n)
    if kind == "causal":
        mask = ", is_causal=True"
    elif kind in ("bool", "window"):
        far = ".triu(-2)" if kind == "window" else ""
        made = body.aside(f"torch.ones({count}, {count}, dtype=torch.bool, device={x}.device).tril(){far}", n, n)
        mask = f", attn_mask={made}"
    elif kind == "bias":
        slopes = body.members.parameter(heads, 1, 1)
        steps = f"torch.arange({count}, device={x}.device)"
        made = body.aside(f"({steps}.view(1, -1) - {steps}.view(-1, 1)).abs() * {slopes} * -0.1", heads, n, n)
        mask = f", attn_mask={made}"
    if kind == "manual":
        spread = (lambda y: f"{y}.repeat_interleave({group}, 1)") if group > 1 else str
        scores = body.aside(f"{q} @ {spread(k)}.transpose(-1, -2) * 0.4", x.shape[0], heads, n, n)
        if body.pick((True, False)):
            hidden = f"torch.ones({count}, {count}, dtype=torch.bool, device={x}.device).triu(1)"
            scores = body.aside(f"{scores}.masked_fill({hidden}, float('-inf'))", *scores.shape)
        y = body.aside(f"{scores}.softmax(-1) @ {spread(v)}", x.shape[0], heads, n, size)
    else:
        grouped = ", enable_gqa=True" if group > 1 else ""
        y = body.aside(f"F.scaled_dot_product_attention({q}, {k}, {v}{mask}{grouped})", x.shape[0], heads, n, size)
    y = body.emit(f"{y}.transpose(1, 2).flatten(2)", x.shape[0], n, heads * size)
    if body.pick((True, False)):
        made = body.members.module(f"Linear({heads * size}, {x.last}{bias})")
        y = body.emit(f"{made}({y})", *x.shape)
    return y


@step(lambda body, x: bool(body.ids) and x.rank > 2 and x.shape[1] == SEQ)
def marked(body: Body, x: Value) -> Value:
    """What depends on token ids: masks and look-ups."""
    ids = body.ids
    for _ in range(x.rank - 2):
        ids = f"{ids}.unsqueeze(-1)"
    forms = ["{x}.masked_fill({i} > 3, 0.0)", "torch.where({i} > 2, {x}, -{x})", "{x} * ({i} != 1)"]
    if x.rank == 3 and isinstance(x.last, int):
        table = body.members.module(f"Embedding(11, {x.last}{body.pick(('', ', padding_idx=0'))})")
        forms += [f"{{x}} + {table}({body.ids})", "{x} + F.one_hot({ids} % {n}, {n})"]
    return body.emit(body.pick(forms).format(x=x, i=ids, ids=body.ids, n=x.last), *x.shape)


@step(lambda body, x: x.rank > 1 and not of_batch(x.shape[-1]) and wide(body, x))
def picked(body: Body, x: Value) -> Value:
    """Rows by index: gathered, selected, the largest."""
    dim = body.pick(x.wide_dims()[::-1])
    size = x.shape[dim]
    assert isinstance(size, int)
    form = body.pick(("index_select", "index", "topk", "gather", "select"))
    if form in ("index_select", "index"):
        places = [body.pick(range(size)) for _ in range(body.pick((2, 4, 3, 1, 6)))]
        index = body.members.buffer(str(places))
        colons = ":, " * dim
        made = f"{x}[{colons}{index}]" if form == "index" else f"{x}.index_select({dim}, {index})"
        return body.emit(made, *swapped(x.shape, dim, len(places)))
    if form in ("topk", "gather") and dim == x.rank - 1:
        untied = body.aside(f"{x} + {body.members.parameter(size)}", *x.shape)
        if form == "topk":
            return body.emit(f"{untied}.topk({min(2, size)}, dim=-1).values", *swapped(x.shape, dim, min(2, size)))
        made = f"{x}.gather(-1, {untied}.detach().argmax(-1, keepdim=True))"
        return body.emit(made, *swapped(x.shape, dim, 1))
    return body.emit(f"{x}.select({dim}, {body.pick(range(size))})", *without(x.shape, dim))
