"""Look-ups: embedding (split vocabularies included), index, gather."""

from __future__ import annotations

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
    dim = int(call.arg(1, "dim")) % max(1, len(call.shapes[0]))
    names = Names()
    source, index = [], []
    for position, (size, picked) in enumerate(zip(*call.shapes[:2], strict=True)):
        if position != dim and size == picked:
            source.append(names.take(size))
            index.append(source[-1])
        else:
            source.append(names.take(size) + "^")
            index.append(names.take(picked) + ("" if position == dim else "^"))
    return f"{' '.join(source)}, {' '.join(index)} -> {' '.join(index)}"


ENTRIES = [
    Entry("aten.embedding", compute=_embedding, variants=_split_table, uneven="v"),
    Entry("aten.index_select", compute=_index_select),
    Entry("aten.index", compute=_index),
    Entry("aten.gather", compute=_gather),
]
