"""Steps that move elements, and those of images and sound; see `fuzz.steps`."""

from __future__ import annotations

from math import prod

from autopar.graph.size import BATCH, SEQ
from fuzz.steps import always, deep, featured, step, unary, wide
from fuzz.writing import Body, Value, of_batch, shape_text, swapped, text


@step(deep)
def transposed(body: Body, x: Value) -> Value:
    """Dims in another order; samples stay where they are, or come back after a step in between."""
    dims = list(range(1, x.rank))
    a = body.pick(dims)
    b = body.pick([dim for dim in dims if dim != a])
    shape = list(x.shape)
    shape[a], shape[b] = shape[b], shape[a]
    if body.pick((True, True, False)):
        return body.emit(f"{x}.transpose({a}, {b})", *shape)
    if body.pick((True, False)):
        order = list(range(x.rank))
        order[a], order[b] = b, a
        return body.emit(f"{x}.permute({', '.join(map(str, order))})", *shape)
    turned = body.aside(f"{x}.transpose(0, {a})", x.shape[a], *x.shape[1:a], x.shape[0], *x.shape[a + 1 :])
    factor = body.along(turned) if isinstance(turned.last, int) else "0.5"
    made = body.aside(f"({turned} * {factor}).tanh()", *turned.shape)
    return body.emit(f"{made}.transpose(0, {a})", *x.shape)


@step(featured)
def split_(body: Body, x: Value) -> object:
    """The last dim in parts, each of which goes its own way, or back together in another order."""
    assert isinstance(x.last, int)
    counts = [n for n in (2, 3, 4) if x.last % n == 0]
    if not counts:
        return unary(body, x)
    n = body.pick(counts)
    size = x.last // n
    form = body.pick((f"{x}.chunk({n}, -1)", f"{x}.split({size}, -1)", f"{x}.unflatten(-1, ({n}, {size})).unbind(-2)"))
    names = [f"x{len(body.lines)}_{index}" for index in range(n)]
    body.lines.append(f"{', '.join(names)} = {form}")
    parts = [Value(name, (*x.shape[:-1], size)) for name in names]
    if body.pick((True, False)):
        return body.emit(f"{parts[0]} * {parts[-1]}.sigmoid()", *parts[0].shape)
    if body.pick((True, False)):
        return body.emit(f"torch.cat([{', '.join(map(str, reversed(parts)))}], -1)", *x.shape)
    body.values += parts
    return None


@step(wide)
def sliced(body: Body, x: Value) -> Value:
    dim = body.pick(x.wide_dims()[::-1])
    size = x.shape[dim]
    assert isinstance(size, int)
    length = body.pick([n for n in (max(size // 2, 1), 1, size - 1) if n])
    start = body.pick([at for at in (0, length, size - length) if at + length <= size])
    if body.pick((True, False)):
        return body.emit(f"{x}.narrow({dim}, {start}, {length})", *swapped(x.shape, dim, length))
    colons = ":, " * dim
    return body.emit(f"{x}[{colons}{start}:{start + length}]", *swapped(x.shape, dim, length))


@step(lambda body, x: bool(x.own_dims()) and x.rank > 1)
def joined(body: Body, x: Value) -> Value:
    """With another value, or with itself, along a dim."""
    dim = body.pick(x.own_dims()[::-1])
    fits = lambda y: y.rank == x.rank and swapped(y.shape, dim, 1) == swapped(x.shape, dim, 1)  # noqa: E731
    y = body.pick([*body.others(x, fits)[::-1], x])
    if y.shape == x.shape and body.pick((False, False, True)):
        shape = (*x.shape[:dim], 2, *x.shape[dim:])
        return body.emit(f"torch.stack([{x}, {y}], {dim})", *shape)
    return body.emit(f"torch.cat([{x}, {y}], {dim})", *swapped(x.shape, dim, x.shape[dim] + y.shape[dim]))


@step(wide)
def unflattened(body: Body, x: Value) -> object:
    dim = body.pick(x.wide_dims()[::-1])
    size = x.shape[dim]
    assert isinstance(size, int)
    factors = [n for n in (2, 4, 3) if size % n == 0 and size > n]
    if not factors or x.rank > 4:
        return sliced(body, x)
    n = body.pick(factors)
    return body.emit(f"{x}.unflatten({dim}, ({n}, {size // n}))", *x.shape[:dim], n, size // n, *x.shape[dim + 1 :])


@step(deep)
def flattened(body: Body, x: Value) -> object:
    """Two neighbouring dims as one; with the samples in it they come apart again after a step."""
    dim = body.pick(list(range(x.rank - 1))[::-1])
    a, b = x.shape[dim], x.shape[dim + 1]
    whole = (*x.shape[:dim], a * b, *x.shape[dim + 2 :])
    if not of_batch(a):
        if not (isinstance(a, int) or isinstance(b, int)):
            return unary(body, x)
        if body.writes(*whole) and body.pick((True, False)):
            return body.emit(f"{x}.reshape({shape_text(whole)})", *whole)
        return body.emit(f"{x}.flatten({dim}, {dim + 1})", *whole)
    if not body.writes(b):
        return unary(body, x)
    flat = body.aside(f"{x}.flatten(0, 1)", *whole)
    made = body.aside(f"F.gelu({flat} + {body.along(flat) if isinstance(flat.last, int) else 0.5})", *whole)
    if isinstance(x.last, int) and x.rank > 2 and body.pick((True, False)):
        n = body.width()
        made = body.aside(f"{body.members.module(f'Linear({x.last}, {n})')}({made})", *whole[:-1], n)
    return body.emit(f"{made}.unflatten(0, (-1, {text(b)}))", a, b, *made.shape[1:])


@step(wide)
def reshaped(body: Body, x: Value) -> object:
    """All dims of fixed sizes behind the others, seen as others."""
    count = 0
    while count < x.rank and isinstance(x.shape[-1 - count], int):
        count += 1
    lead, sizes = x.shape[: x.rank - count], [size for size in x.shape[x.rank - count :] if isinstance(size, int)]
    total = prod(sizes)
    options = [(a, total // a) for a in (2, 3, 4, 6, 8) if total % a == 0 and total > a and [a, total // a] != sizes]
    if count < 2 or not options or not body.writes(*lead):
        return unflattened(body, x)
    target = (*lead, *body.pick(options))
    return body.emit(f"{x}.reshape({shape_text(target)})", *target)


@step(always)
def single(body: Body, x: Value) -> Value:
    """A dim of size one comes or goes."""
    ones = [dim for dim, size in enumerate(x.shape) if size == 1]
    if ones and x.rank > 2:
        dim = body.pick(ones)
        return body.emit(f"{x}.squeeze({dim})", *x.shape[:dim], *x.shape[dim + 1 :])
    if x.rank > 3:
        return unary(body, x)  # type: ignore[return-value]
    dim = body.pick(list(range(1, x.rank + 1)))
    one = body.emit(f"{x}.unsqueeze({dim})", *x.shape[:dim], 1, *x.shape[dim:])
    if body.pick((True, False)):
        return one
    n = body.width()
    shape = swapped(one.shape, dim, n)
    grown = ", ".join(str(n) if index == dim else "-1" for index in range(one.rank))
    return body.emit(f"{one}.expand({grown})", *shape)


@step(wide)
def shifted(body: Body, x: Value) -> Value:
    """Elements at other places of the same tensor, sums over those before, zeros around them."""
    dim = body.pick([*x.wide_dims()[::-1], *[dim for dim in x.own_dims() if x.shape[dim] == SEQ]])
    forms = [f"{x}.flip({dim})", f"{x}.roll(1, {dim})", f"{x}.cumsum({dim}) * 0.3"]
    if x.rank > 2 and len(x.wide_dims()) > 1 and all(isinstance(size, int) for size in x.shape[-2:]):
        forms += [f"{x}.tril()", f"{x}.triu(-1)"]
    if isinstance(x.last, int):
        forms += [f"F.pad({x}, (1, 0))", f"F.pad({x}, (0, 2), value=1.5)"]
    form = body.pick(forms)
    grown = 1 if "(1, 0)" in form else 2 if "(0, 2)" in form else 0
    return body.emit(form, *(swapped(x.shape, x.rank - 1, x.last + grown) if grown else x.shape))


@step(wide)
def repeated(body: Body, x: Value) -> Value:
    dim = body.pick(x.wide_dims()[::-1])
    shape = swapped(x.shape, dim, x.shape[dim] * 2)
    counts = ", ".join("2" if index == dim else "1" for index in range(x.rank))
    return body.emit(body.pick((f"{x}.repeat({counts})", f"{x}.repeat_interleave(2, {dim})")), *shape)


@step(lambda body, x: x.rank == 3 and isinstance(x.shape[1], int) and x.shape[1] > 1)
def along_last(body: Body, x: Value) -> Value:
    """A convolution of channels [b, c, n] that keeps n."""
    channels, n = x.shape[1], body.width()
    assert isinstance(channels, int)
    groups = [g for g in (1, 2, 4, channels) if channels % g == 0]
    g = body.pick(groups)
    n = n if g == 1 else n * g if n * g <= 24 else g
    made = body.members.module(f"Conv1d({channels}, {n}, 3, padding=1, groups={g}{body.pick(('', ', bias=False'))})")
    return body.emit(f"{made}({x})", x.shape[0], n, x.shape[2])


@step(lambda body, x: x.rank == 3 and x.shape[:2] == (BATCH, SEQ) and isinstance(x.last, int))
def recurrent(body: Body, x: Value) -> Value:
    n = body.pick((4, 3, 2))
    kind = body.pick(("GRU", "LSTM", "RNN"))
    return body.emit(f"{body.members.module(f'{kind}({x.last}, {n}, batch_first=True)')}({x})[0]", *x.shape[:-1], n)


def _image(body: Body, x: Value) -> bool:
    return x.rank == 4 and all(isinstance(size, int) and size > 1 for size in x.shape[1:])


@step(_image)
def image(body: Body, x: Value) -> Value:
    """Convolutions, pools, resizing and group norms of [b, c, h, w]."""
    b, c, h, w = x.shape
    assert isinstance(c, int)
    assert isinstance(h, int)
    assert isinstance(w, int)
    n, g = body.width(), body.pick([g for g in (1, 2, 4) if c % g == 0])
    n = n if n % g == 0 else n * g
    forms = [
        (f"Conv2d({c}, {n}, 3, padding=1, groups={g})", (n, h, w)),
        (f"Conv2d({c}, {n}, 1, bias=False)", (n, h, w)),
        (f"GroupNorm({g}, {c})", (c, h, w)),
        ("Upsample(scale_factor=2)", (c, 2 * h, 2 * w)),
        ("AdaptiveAvgPool2d(1)", (c, 1, 1)),
    ]
    if h % 2 == 0 and w % 2 == 0:
        forms += [
            ("AvgPool2d(2)", (c, h // 2, w // 2)),
            ("MaxPool2d(2)", (c, h // 2, w // 2)),
            (f"Conv2d({c}, {n}, 2, stride=2)", (n, h // 2, w // 2)),
        ]
    if h * w <= 16:
        forms.append((f"ConvTranspose2d({c}, {n}, 2, stride=2, groups={g})", (n, 2 * h, 2 * w)))
    made, shape = body.pick(forms)
    source = f"{x}"
    if made.startswith("MaxPool"):  # no ties
        source = f"({x} + {body.members.parameter(1, h, w)})"
    return body.emit(f"{body.members.module(made)}({source})", b, *shape)
