"""Canonical forms of single operators: shapes, transposes, casts, arithmetic that changes nothing.

Each rule sees one operator (see `autopar.graph.draft.rewrite`) and returns the value that replaces it, or None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from autopar.errors import UnsupportedError
from autopar.graph.draft import Draft, Rule, live, rewrite
from autopar.graph.ir import Node, Ref
from autopar.graph.size import Size, divide, size_at

INT_MAX = 2**63 - 1
_LARGE = 1 << 20
MAX_PASSES = 50


def simplify(draft: Draft, *rule_sets: dict[str, list[Rule]]) -> Draft:
    """Apply the rules here and in ``rule_sets`` until none fires; dead nodes go."""
    rules: dict[str, list[Rule]] = {}
    for rule_set in (RULES, *rule_sets):
        for op, more in rule_set.items():
            rules.setdefault(op, []).extend(more)
    draft = live(draft)
    for _ in range(MAX_PASSES):
        draft, fired = rewrite(draft, rules)
        if not fired:
            return draft
    raise RuntimeError(f"simplification did not settle in {MAX_PASSES} passes (a bug in autopar)")


def reshape(node: Node, new: Draft) -> Ref | None:
    """A reshape as flattens and unflattens, aligned from the left; (b s) is never mixed with features needlessly."""
    x: Ref = node.args[0]
    # From the last group to the first, so that the dims of groups still to come stay where they are.
    for first, last, sizes in reversed(_groups(new.shape(x), node.meta.shape)):
        old = new.shape(x)[first : last + 1]
        if tuple(old) == sizes:
            continue
        if len(old) > 1 and len(sizes) == 1 and sizes[0] in old and all(s in (1, sizes[0]) for s in old):
            for place in reversed([p for p in range(len(old)) if p != old.index(sizes[0])]):
                x = new.squeeze(x, first + place)
            continue
        x = new.flatten(x, first, last)
        if len(sizes) > 1:
            x = new.unflatten(x, first, sizes)
    return x


def _groups(
    source: Sequence[int | Size], target: Sequence[int | Size]
) -> list[tuple[int, int, tuple[int | Size, ...]]]:
    """Smallest runs of source dims (first, last) that hold the same elements as runs of target dims (their sizes)."""
    groups: list[tuple[int, int, tuple[int | Size, ...]]] = []
    i = j = 0
    while i < len(source) and j < len(target):
        first_i, first_j = i, j
        left, right = source[i], target[j]
        i, j = i + 1, j + 1
        while left != right:
            # Any sizes larger than all model dims do: only the order of the partial products matters.
            if size_at(left, 10**7 + 19, 10**9 + 7) < size_at(right, 10**7 + 19, 10**9 + 7):
                left, i = left * source[i], i + 1
            else:
                right, j = right * target[j], j + 1
        groups.append((first_i, i - 1, tuple(target[first_j:j])))
    if groups and (i < len(source) or j < len(target)):  # what remains are ones
        first, _, sizes = groups.pop()
        groups.append((first, len(source) - 1, (*sizes, *target[j:])))
    return groups


def flatten_of_unflatten(node: Node, new: Draft) -> Ref | None:
    x, start, end = _padded(node, 3, (0, -1))
    rank = len(new.shape(x))
    start, end = start % rank, end % rank
    inner = new.producer(x, "aten.unflatten")
    if inner and inner.args[1] == start and len(inner.args[2]) == end - start + 1:
        return inner.args[0]  # type: ignore[no-any-return]
    if node.args != (x, start, end) or start == end:
        return new.flatten(x, start, end)
    return None


def unflatten(node: Node, new: Draft) -> Ref | None:
    x, dim, sizes = node.args
    count = len(sizes)
    result = node.meta.shape[dim : dim + count]
    inner = new.producer(x, "aten.flatten")
    if inner and inner.args[1] == dim and new.shape(inner.args[0])[dim : inner.args[2] + 1] == result:
        return inner.args[0]  # type: ignore[no-any-return]
    if count == 2 and result[0] == 1:
        return new.unsqueeze(x, dim)
    if count == 2 and result[1] == 1:
        return new.unsqueeze(x, dim + 1)
    if sum(size == -1 for size in sizes) == 0:
        return new.unflatten(x, dim, result)
    return None


def slice_(node: Node, new: Draft) -> Ref | None:
    """Bounds resolved; a stride that divides the dim becomes unflatten and select, another of known size a look-up."""
    x, dim, start, end, step = _padded(node, 5, (0, None, None, 1))
    size = new.shape(x)[dim]
    start = bound(0 if start is None else start, size)
    end = bound(size if end is None else end, size)
    if step == 1:
        return None if node.args == (x, dim, start, end) else new.slice(x, dim, start, end)
    rows = divide(size, step)
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int) and (rows is None or start >= step):
        places = new.emit("aten.arange", start, end, step, shape=(node.meta.shape[dim],), dtype="int64")
        return Ref(new.emit("aten.index_select", x, dim % len(new.shape(x)), Ref(places), shape=node.meta.shape))
    if rows is None or end != size or not isinstance(start, int) or start >= step:
        raise UnsupportedError(
            f"module {node.module!r} slices dim {dim} of size {size} with step {step}; reshape instead"
        )
    return new.select(new.unflatten(x, dim, (rows, step)), dim + 1, start)


def bound(value: int | Size, size: int | Size) -> int | Size:
    """A start or end of a slice of a dim of ``size``, negative ones counted from its end."""
    if isinstance(value, int) and isinstance(size, int):
        return min(max(value + size if value < 0 else value, 0), size)
    if value == INT_MAX:
        return size
    # A size such as -s is negative whatever b and s are, or a slice from its end would have no one form.
    return size + value if size_at(value, _LARGE, _LARGE) < 0 else value


def narrow(node: Node, new: Draft) -> Ref | None:
    x, dim, start, length = node.args
    return new.slice(x, dim, start, start + length)


def expand(node: Node, new: Draft) -> Ref | None:
    x = node.args[0]
    if new.shape(x) == node.meta.shape:
        return x  # type: ignore[no-any-return]
    if node.args == (x, node.meta.shape):
        return None
    return new.expand(x, node.meta.shape)


def transposed(node: Node, new: Draft) -> Ref | None:
    """Every permutation of two dims is a transpose (`aten.t` of a matrix); a double transpose is nothing."""
    x = node.args[0]
    rank = len(new.shape(x))
    if node.op == "aten.permute":
        order = tuple(dim % rank for dim in node.args[1])
        moved = [dim for dim in range(rank) if order[dim] != dim]
        if len(moved) > 2:
            return None
        first, second = moved if moved else (0, 0)
    elif node.op in ("aten.t", "aten.numpy_T"):
        if rank > 2:
            return None
        first, second = (0, 1) if rank == 2 else (0, 0)
    else:
        first, second = sorted(dim % rank for dim in ((rank - 2, rank - 1) if node.op == "aten.mT" else node.args[1:3]))
    inner = new.producer(x, ("aten.t", "aten.transpose"))
    if inner and (inner.args[1:] or (0, 1)) == (first, second):
        return inner.args[0]  # type: ignore[no-any-return]
    done = (x,) if rank == 2 else (x, first, second)
    if node.op == ("aten.t" if rank == 2 else "aten.transpose") and node.args == done:
        return None
    return new.transpose(x, first, second)


def squeezed(node: Node, new: Draft) -> Ref | None:
    inner = new.producer(node.args[0], "aten.unsqueeze")
    if node.op == "aten.squeeze" and inner and len(node.args) > 1 and inner.args[1] == node.args[1]:
        return inner.args[0]  # type: ignore[no-any-return]
    if node.op == "aten.squeeze" and len(node.args) > 1 and new.shape(node.args[0]) == node.meta.shape:
        return node.args[0]  # type: ignore[no-any-return]
    return None


def cast(node: Node, new: Draft) -> Ref | None:
    """No cast to the same dtype; widening and narrowing back is nothing."""
    x, dtype = node.args
    if new.meta(x).dtype == dtype:
        return x  # type: ignore[no-any-return]
    inner = new.producer(x, "autopar.cast")
    if inner and inner.args[1] == "float32" and dtype == "compute" == new.meta(inner.args[0]).dtype:
        return inner.args[0]  # type: ignore[no-any-return]
    return None


def arithmetic(node: Node, new: Draft) -> Ref | None:
    """x + 0, x - 0, x * 1, x / 1, also where the number fills a tensor."""
    if len(node.args) != 2 or node.kwargs:
        return None
    x, y = node.args
    if node.op in ("aten.add", "aten.mul") and (not isinstance(x, Ref) or new.producer(x, "aten.full")):
        x, y = y, x
    neutral = 1 if node.op in ("aten.mul", "aten.div") else 0
    if isinstance(y, Ref) and (filled := new.producer(y, "aten.full")):
        y = filled.args[1]
    if isinstance(y, bool | Ref | Size) or y != neutral or not isinstance(x, Ref):
        return None
    return x if new.meta(x).dtype == node.meta.dtype and new.shape(x) == node.meta.shape else None


def concatenate(node: Node, new: Draft) -> Ref | None:
    """Without parts that are empty (what partial rotary embeddings leave of a head when they turn all of it)."""
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    kept = tuple(part for part in parts if 0 not in new.shape(part))
    if len(kept) == len(parts) or 0 in node.meta.shape:
        return None
    if len(kept) == 1:
        return kept[0] if new.meta(kept[0]).dtype == node.meta.dtype else None
    return Ref(new.emit(node.op, kept, dim, shape=node.meta.shape))


def dropout(node: Node, new: Draft) -> Ref | None:
    x, p, train = _padded(node, 3, (0.5, True))
    return x if p == 0 or not train else None


def attention(node: Node, new: Draft) -> Ref | None:
    """Arguments after q, k, v by name; only those that differ from their defaults."""
    q, k, v, mask, p, causal = _padded(node, 6, (None, 0.0, False))
    options = {"attn_mask": mask, "dropout_p": p, "is_causal": causal, **node.kwargs}
    width = new.shape(q)[-1]
    scale = options.get("scale")
    if scale is not None and isinstance(width, int) and math.isclose(scale, 1 / math.sqrt(width)):
        del options["scale"]
    options = {
        key: value for key, value in options.items() if value not in (None, 0.0, False) or isinstance(value, Ref)
    }
    if node.args == (q, k, v) and options == node.kwargs:
        return None
    return Ref(new.emit(node.op, q, k, v, shape=node.meta.shape, options=options))


def softmax(node: Node, new: Draft) -> Ref | None:
    x, dim, dtype = _padded(node, 3, (None,))
    if dtype is None:
        return None
    return Ref(new.emit(node.op, new.cast(x, dtype), dim, shape=node.meta.shape))


def product(node: Node, new: Draft) -> Ref | None:
    """Products with a matrix on the right are linear layers; a batch flattened for them is put back after."""
    bias, alpha = None, node.kwargs
    if node.op == "aten.addmm":
        bias, x, weight = node.args
        if alpha or len(new.shape(bias)) != 1:
            return None
    elif node.op == "aten.linear":
        x, weight, bias = _padded(node, 3, (None,))
    else:
        x, weight = node.args
    if len(new.shape(weight)) != 2:
        return None
    if len(new.shape(x)) == 2 and (flat := new.producer(x, "aten.flatten")) and flat.args[1] == 0:
        whole = flat.args[0]
        result = _linear(new, whole, weight, bias, node.op == "aten.linear")
        return new.flatten(result, 0, len(new.shape(whole)) - 2)
    if node.op == "aten.linear" or (node.op != "aten.addmm" and not _is_weight(new, weight)):
        return None
    return _linear(new, x, weight, bias, False)


def _linear(new: Draft, x: Ref, weight: Ref, bias: Ref | None, is_linear: bool) -> Ref:
    if not is_linear:
        weight = new.transpose(weight, 0, 1)
        inner = new.producer(weight, "aten.t")
        twice = inner and new.producer(inner.args[0], "aten.t")
        weight = twice.args[0] if twice else weight
    shape = (*new.shape(x)[:-1], new.shape(weight)[0])
    return Ref(new.emit("aten.linear", x, weight, *(() if bias is None else (bias,)), shape=shape))


def _is_weight(new: Draft, value: Ref) -> bool:
    inner = new.producer(value, "aten.t")
    return new.nodes[(inner.args[0] if inner else value).name].kind == "parameter"


def batched(node: Node, new: Draft) -> Ref | None:
    """A product of matrices whose batch and heads were flattened for it takes them apart, and flattens its result."""
    bias, x, y = node.args if node.op == "aten.baddbmm" else (None, *node.args)
    if (wide := _apart(x, y, new)) is None:
        return None
    left, right = wide
    shape = (*new.shape(left)[:-1], new.shape(right)[-1])
    result = Ref(new.emit("aten.matmul", left, right, shape=shape))
    if bias is None:
        return new.flatten(result, 0, 1)
    added = bias
    if len(new.shape(bias)) == 3 and new.shape(bias)[0] != 1:
        added = new.unflatten(bias, 0, shape[:2])
    for key, value in (("alpha", result), ("beta", added)):
        if node.kwargs.get(key, 1) != 1:
            scaled = Ref(new.emit("aten.mul", value, node.kwargs[key], shape=new.shape(value)))
            result, added = (scaled, added) if key == "alpha" else (result, scaled)
    total = Ref(new.emit("aten.add", added, result, shape=shape, dtype=node.meta.dtype))
    return new.flatten(total, 0, 1)


def _apart(x: Ref, y: Ref, new: Draft) -> tuple[Ref, Ref] | None:
    """The operands before their first two dims were flattened, if both were alike."""
    found = []
    for value in (x, y):
        turned = new.producer(value, "aten.transpose")
        turned = turned if turned and turned.args[1:] == (1, 2) else None
        flat = new.producer(turned.args[0] if turned else value, "aten.flatten")
        if not flat or flat.args[1:] != (0, 1) or len(new.shape(flat.args[0])) != 4:
            return None
        found.append(new.transpose(flat.args[0], 2, 3) if turned else flat.args[0])
    left, right = found
    return (left, right) if new.shape(left)[:2] == new.shape(right)[:2] else None


def repeated(node: Node, new: Draft) -> Ref | None:
    """A repetition of dims of size one is an expansion; one of nothing is nothing."""
    x, counts = node.args
    shape = new.shape(x)
    extra = len(counts) - len(shape)
    if any(count != 1 and size != 1 for count, size in zip(counts[extra:], shape, strict=True)):
        return None
    if node.meta.shape == shape:
        return x  # type: ignore[no-any-return]
    return new.expand(x, node.meta.shape)


def repeated_in_place(node: Node, new: Draft) -> Ref | None:
    """Elements of the flattened tensor, each as often, are repeated along its one dim."""
    x, *rest = node.args
    dim = rest[1] if len(rest) > 1 else node.kwargs.get("dim")
    if dim is not None or not rest or not isinstance(rest[0], int):
        return None
    flat = new.flatten(x, 0, len(new.shape(x)) - 1)
    return Ref(new.emit(node.op, flat, rest[0], 0, shape=node.meta.shape))


def _padded(node: Node, count: int, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    missing = count - len(node.args)
    return node.args[:count] + (defaults[len(defaults) - missing :] if missing > 0 else ())


def detach(node: Node, new: Draft) -> Ref | None:
    return None if new.meta(node.args[0]).requires_grad else node.args[0]


RULES: dict[str, list[Rule]] = {
    "aten.reshape": [reshape],
    "aten.flatten": [flatten_of_unflatten],
    "aten.unflatten": [unflatten],
    "aten.slice": [slice_],
    "aten.narrow": [narrow],
    "aten.expand": [expand],
    **{f"aten.{name}": [transposed] for name in ("transpose", "t", "permute", "mT", "numpy_T", "swapaxes", "swapdims")},
    "aten.squeeze": [squeezed],
    "autopar.cast": [cast],
    **{f"aten.{name}": [arithmetic] for name in ("add", "sub", "mul", "div")},
    "aten.cat": [concatenate],
    "aten.dropout": [dropout],
    "aten.scaled_dot_product_attention": [attention],
    "aten.softmax": [softmax],
    "aten.log_softmax": [softmax],
    **{f"aten.{name}": [product] for name in ("addmm", "mm", "matmul", "linear")},
    "aten.bmm": [batched],
    "aten.baddbmm": [batched],
    "aten.repeat": [repeated],
    "aten.repeat_interleave": [repeated_in_place],
    "aten.detach": [detach],
}
