"""Look-ups: embedding (split vocabularies included), index, gather."""

from __future__ import annotations

from autopar.graph.size import divide
from autopar.sharding.factors import Mismatch, Names, Variant
from autopar.sharding.rules.entry import Call, Entry


def _embedding(call: Call) -> str:
    return "v+ d, ... -> ... d"


def _split_table(call: Call) -> dict[str, Variant]:
    """Over a split vocabulary each rank looks up the ids it holds, zeros for the others, and the results add up."""
    return {"v": Variant("vocab")}


def _index_select(call: Call) -> str:
    return _rows(call, int(call.node.args[1]))


def _rows(call: Call, dim: int) -> str:
    """x with dim ``dim`` replaced by the dims of the index."""
    names = Names()
    source = [names.take(size) for size in reversed(call.shapes[0])][::-1]
    index = [names.take(size) for size in reversed(call.shapes[1])][::-1]
    dim %= len(source)
    target = [*source[:dim], *index, *source[dim + 1 :]]
    source[dim] += "^"
    return f"{' '.join(source)}, {' '.join(index) or '()'} -> {' '.join(target) or '()'}"


def _index(call: Call) -> str:
    """``x[:, :, i]`` with one integer tensor. Several index tensors, or a mask, are not covered."""
    entries = call.arg(1, "indices", ())
    if len(call.operands) != 2 or call.operands[1].dtype == "bool":
        raise Mismatch("index with several tensors or a mask")
    return _rows(call, next(position for position, entry in enumerate(entries) if entry is not None))


def _gather(call: Call) -> str:
    """Dims other than the gathered one are shared where x and the index agree in size, else whole."""
    source, index = _along(call)
    return f"{' '.join(source)}, {' '.join(index)} -> {' '.join(index)}"


def _along(call: Call) -> tuple[list[str], list[str]]:
    """The factors of x and of the index; those of the dim that indices run along stay whole."""
    dim = int(call.arg(1, "dim")) % max(1, len(call.shapes[0]))
    names = Names()
    source: list[str] = []
    index: list[str] = []
    for position, (size, picked) in enumerate(zip(*call.shapes[:2], strict=True)):
        if position != dim and size == picked:
            source.append(names.take(size))
            index.append(source[-1])
        else:
            source.append(names.take(size) + "^")
            index.append(names.take(picked) + ("" if position == dim and call.node.op == "aten.gather" else "^"))
    return source, index


def _scatter(call: Call) -> str:
    """A number, or one for each index, written at places along a dim; the other dims are shared where x and the index
    agree in size."""
    if len(call.node.args) != 4 or call.node.kwargs:
        raise Mismatch("scatter with a reduction")
    source, index = _along(call)
    given = [" ".join(source), " ".join(index)]
    if len(call.operands) == 3:
        if call.shapes[2] != call.shapes[1]:
            raise Mismatch("scatter of a tensor larger than its index")
        given.append(given[1])
    return f"{', '.join(given)} -> {given[0]}"


def _one_hot(call: Call) -> str:
    """A dim of its own tells which class each element is of."""
    names = Names()
    source = [names.take(size) for size in reversed(call.shapes[0])][::-1]
    return f"{' '.join(source) or '()'} -> {' '.join([*source, names.take(call.output[-1])])}^"


def _scatter_add(call: Call) -> str:
    """Elements added at places along a dim: parts of them add up, and what they are added to is added once."""
    source, index = _along(call)
    if len(call.operands) != 3 or call.shapes[2] != call.shapes[1]:
        raise Mismatch("scatter_add of a tensor larger than its index")
    dim = int(call.arg(1, "dim")) % max(1, len(source))
    added = [name.rstrip("^") + "+" if position == dim else name for position, name in enumerate(index)]
    return f"{' '.join(source)}, {' '.join(added)}, {' '.join(added)} -> {' '.join(source)}"


def _index_add(call: Call) -> str:
    """Slices added at places along a dim, as in `_scatter_add`."""
    if call.node.kwargs or len(call.operands) != 3 or len(call.shapes[2]) != len(call.shapes[0]):
        raise Mismatch("index_add with a factor")
    dim = int(call.node.args[1]) % len(call.shapes[0])
    names = Names()
    source = [names.take(size) for size in reversed(call.shapes[0])][::-1]
    rows = names.take(call.shapes[1][0]) + "+"
    added = [rows if position == dim else name for position, name in enumerate(source)]
    source[dim] += "^"
    return f"{' '.join(source)}, {rows}, {' '.join(added)} -> {' '.join(source)}"


def _masked_scatter(call: Call) -> str:
    """Rows of ``source`` in place of the rows that the mask marks, in order: what puts images among the tokens.

    Every sample must mark equally many; then each takes its own part of the source, whose rows are ``(b n)``.
    """
    x, mask, source = call.shapes
    if len(x) != 3 or mask not in ((*x[:2], 1), x) or len(source) not in (2, 3) or source[-1] != x[2]:
        raise Mismatch("masked_scatter of anything but rows into [b, s, d]")
    wide = mask == x and mask[2] != 1
    if len(source) == 3 and source[0] == x[0]:  # a sample's rows are a dim of their own
        return f"b s^ d{'^' * wide}, b s^ {'d^' if wide else '1'}, b n^ d{'^' * wide} -> b s^ d{'^' * wide}"
    if len(source) != 2:
        raise Mismatch("rows of more or fewer samples")
    if (rows := divide(source[0], x[0])) is None:
        raise Mismatch("rows that are no multiple of the samples")
    n = "1" if rows == 1 else "n^"
    first = "b" if rows == 1 else f"(b {n})"
    return f"b s^ d{'^' * wide}, b s^ {'d^' if wide else '1'}, {first} d{'^' * wide} -> b s^ d{'^' * wide}"


ENTRIES = [
    Entry("aten.embedding", compute=_embedding, variants=_split_table, uneven="v"),
    Entry("aten.index_select", compute=_index_select),
    Entry("aten.index", compute=_index),
    Entry("aten.gather", compute=_gather),
    Entry("aten.scatter", compute=_scatter),
    Entry("aten.one_hot", compute=_one_hot),
    Entry("aten.scatter_add", compute=_scatter_add, linear="02", once="0"),
    Entry("aten.index_add", compute=_index_add, linear="02", once="0"),
    Entry("aten.masked_scatter", compute=_masked_scatter),
]
