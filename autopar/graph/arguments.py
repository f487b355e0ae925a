"""Canonical arguments: operators that say the same in several ways say it in one."""

from __future__ import annotations

from string import ascii_letters

from autopar.graph.draft import Draft, Rule
from autopar.graph.ir import Node, Ref


def reduction(node: Node, new: Draft) -> Ref | None:
    """A reduction in another dtype is one of what is cast to it."""
    options = dict(node.kwargs)
    dtype = options.pop("dtype", None)
    if not isinstance(dtype, str) or not node.args:
        return None
    if dtype in ("int32", "int16", "int8", "uint8", "bool"):  # torch adds such up as int64
        whole = new.cast(node.args[0], "int64")
        total = new.emit(node.op, whole, *node.args[1:], shape=node.meta.shape, options=options)
        return new.cast(Ref(total), dtype)
    return Ref(new.emit(node.op, new.cast(node.args[0], dtype), *node.args[1:], shape=node.meta.shape, options=options))


def layer_norm(node: Node, new: Draft) -> Ref | None:
    return Ref(new.emit(node.op, *node.args[:5], shape=node.meta.shape)) if len(node.args) > 5 else None


def einsum(node: Node, new: Draft) -> Ref | None:
    """The dims that an ellipsis stands for by letters of their own; of one tensor, its dims in another order."""
    equation, operands = node.args[0], node.args[1]
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if len(operands) == 1 and len(set(terms)) == len(terms) and sorted(terms) == sorted(result) and "." not in terms:
        order = tuple(terms.index(letter) for letter in result)
        return Ref(new.emit("aten.permute", operands[0], order, shape=node.meta.shape, dtype=node.meta.dtype))
    if "..." not in terms or not arrow:
        return None
    counts = [
        len(new.shape(x)) - len(term.replace("...", "")) for x, term in zip(operands, terms.split(","), strict=True)
    ]
    most = max(count for count, term in zip(counts, terms.split(","), strict=True) if "..." in term)
    letters = [letter for letter in ascii_letters if letter not in equation][:most]
    written = [
        term.replace("...", "".join(letters[most - count :]))
        for term, count in zip(terms.split(","), counts, strict=True)
    ]
    full = f"{','.join(written)}->{result.replace('...', ''.join(letters))}"
    return Ref(new.emit(node.op, full, operands, shape=node.meta.shape, dtype=node.meta.dtype))


def batch_norm(node: Node, new: Draft) -> Ref | None:
    """By the batch's own statistics: (x, weight, bias, eps)."""
    if len(node.args) < 8 or not node.args[5] or any(isinstance(each, Ref) for each in node.args[3:5]):
        return None
    given = (*node.args[:3], node.args[7])
    return Ref(new.emit(node.op, *given, shape=node.meta.shape, dtype=node.meta.dtype))


RULES: dict[str, list[Rule]] = {
    **{f"aten.{name}": [reduction] for name in ("sum", "mean", "prod", "cumsum", "cumprod")},
    "aten.layer_norm": [layer_norm],
    "aten.group_norm": [layer_norm],
    "aten.batch_norm": [batch_norm],
    "aten.einsum": [einsum],
}
