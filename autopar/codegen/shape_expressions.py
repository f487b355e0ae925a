"""Views, slices and concatenations as a person would write them: no local size where a free one will do."""

from __future__ import annotations

from autopar.codegen.site import Renderer, Site, Sizes, argument, tuple_of
from autopar.codegen.source import Call, Expr, Method, Text, literal
from autopar.graph.size import Size, divide


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
    return Method(argument(x, site.sizes), "unflatten", (literal(dim), tuple_of(tuple(entries))))


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
    return Call("torch.cat", (tuple_of(tuple(argument(t, site.sizes) for t in tensors)), ("dim", literal(dim))))


SHAPES: dict[str, Renderer] = {
    "aten.unflatten": _unflatten,
    "aten.reshape": _reshape,
    "aten.view": _reshape,
    "aten.expand": _expand,
    "aten.slice": _slice,
    "aten.select": _select,
    "aten.index": _index,
    "aten.cat": _concatenate,
}
