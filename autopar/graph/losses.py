"""The loss contract: a sum over the batch, divided by a count that is computed from batch tensors.

`lower` turns the traced loss into (graph of the sum, graph of the count). Accepted: cross-entropy (mean or sum, ignore
index) on logits and class indices, negative log likelihood of a log-softmax, `mean()` and `sum()` over everything, a
sum over the sum of a mask, mse and l1 losses; each optionally scaled by a number. Anything else is refused, since how
it adds up over micro-batches and ranks would be a guess.

A loss may add other terms to such a one: a router's balance, its z-loss. They are computed from the samples of each
micro-batch of each data rank, and count by the number of targets in it (a mean with weights that are no whole numbers,
by its samples): together this is the mean, over targets, of what the model returns for each micro-batch.
`autopar.sharding.data_parallel` sees that they mix samples, so that the size of a micro-batch is part of the model.
A term may be multiplied by what parameters alone make (the learned weights of several tasks), and numbers and terms of
parameters alone count by the targets too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from autopar.errors import BadInputError
from autopar.graph.draft import Draft, live
from autopar.graph.exported import is_number
from autopar.graph.ir import Node, OpGraph, Ref, map_refs
from autopar.graph.naming import leaf_name, named
from autopar.graph.size import BATCH, Size, divide
from autopar.graph.sizes import FixedSequenceError

ACCEPTED = (
    "autopar takes a cross-entropy over class indices (reduction mean or sum, ignore_index), or the mean or sum of a "
    "tensor over all its elements (mse_loss, l1_loss), optionally times a number, sums of such, and other terms beside "
    "such a one; give one with loss=fn(outputs, batch)"
)
MEAN, SUM = 1, 2  # at::Reduction


def lower(draft: Draft) -> tuple[Draft, OpGraph]:
    """Rewrite the output of ``draft`` to the sum over the batch, and build the count graph.

    Raises BadInputError for a loss that is not a sum, or a sum over a count.
    """
    node = draft.nodes[draft.output]
    draft.module = node.module
    node = _numbers_apart(draft, _divided_terms(draft, node, None))
    sums: dict[str, tuple[Ref, OpGraph]] = {}
    others: dict[str, NoMeanError] = {}
    for term in list(_terms(draft, node)):
        try:
            sums[term.name] = _base(draft, term)
        except NoMeanError as refusal:
            others[term.name] = refusal
    counts = [count for _, count in sums.values()]
    if not counts and all(_weighted(draft, draft.nodes[name]) for name in others):
        counts = [_constant_count(BATCH)]
    if not counts:
        raise next(iter(others.values()))
    count = next((count for count in counts if _elements(count) is None), counts[0])
    totals: dict[str, Ref] = {}
    for name, (total, own) in sums.items():
        ratio = _ratio(count, own)
        if ratio is None:  # means over different numbers of targets
            mean = draft.emit("aten.div", total, _counted(draft, own, total), shape=(), dtype=draft.meta(total).dtype)
            totals[name] = _by_targets(draft, Ref(mean), count)
        else:
            totals[name] = total if ratio == 1 else Ref(draft.emit("aten.mul", total, ratio, shape=()))
    for name, error in others.items():
        if not (draft.meta(name).requires_grad or _is_number(draft.nodes[name])) or not count.nodes:
            raise error
        alike = [total for total, own in sums.values() if own == count and draft.nodes[total.name].op == "aten.sum"]
        if _is_number(draft.nodes[name]) and alike and _elements(count) is not None:
            totals[name] = _for_each(draft, draft.nodes[name], alike[0])
        else:
            totals[name] = _by_targets(draft, Ref(name), count)
    draft.output = _sum_of(draft, node, totals).name
    return live(draft), count


def _elements(count: OpGraph) -> int | Size | None:
    """The number that is counted, where it follows from the size of the batch; 1 for a plain sum."""
    nodes = list(count.nodes.values())
    if not nodes:
        return 1
    found: int | Size | None = nodes[0].args[1] if nodes[0].op == "aten.full" else None
    return found


def _ratio(count: OpGraph, other: OpGraph) -> int | float | None:
    """How often ``count`` holds ``other``, if that is the same for every batch."""
    if count == other:
        return 1
    first, second = _elements(count), _elements(other)
    if first is None or second is None:
        return None
    more, less = divide(first, second), divide(second, first)
    return more if isinstance(more, int) else 1 / less if isinstance(less, int) else None


class NoMeanError(BadInputError):
    """A term of the loss that is no sum over the batch, nor one over a count."""


def _added(draft: Draft, node: Node) -> tuple[Node, ...]:
    """The two scalars that ``node`` adds or subtracts, if it does."""
    if node.kind == "op" and node.op in ("aten.add", "aten.sub") and not node.kwargs and len(node.args) == 2:
        terms = tuple(draft.nodes[arg.name] for arg in node.args if isinstance(arg, Ref) and draft.shape(arg) == ())
        return terms if len(terms) == 2 else ()
    return ()


def _terms(draft: Draft, node: Node) -> Iterator[Node]:
    """What ``node`` adds up, each without the number it is scaled by."""
    if terms := _added(draft, node):
        for term in terms:
            yield from _terms(draft, term)
    elif (inner := _scaled(node, draft)) is not None:
        yield from _terms(draft, draft.nodes[inner.name])
    else:
        yield node


def _numbers_apart(draft: Draft, node: Node) -> Node:
    """``node`` with the numbers that it adds (``2 - loss``) as terms of their own."""
    if node.kind != "op":
        return node
    args, op = list(node.args), node.op
    if op == "aten.add" and any(map(_is_zero, _added(draft, node))):
        first, second = _added(draft, node)
        other = second if _is_zero(first) else first
        return draft.nodes[draft.cast(Ref(_numbers_apart(draft, other).name), node.meta.dtype).name]
    if op == "aten.rsub" and len(args) == 2 and not node.kwargs and is_number(args[1]):
        args, op = args[::-1], "aten.sub"
    if op in ("aten.add", "aten.sub") and len(args) == 2 and not node.kwargs and any(map(is_number, args)):
        dtype = node.meta.dtype
        args = [
            Ref(draft.emit("aten.full", (), float(arg), shape=(), dtype=dtype, options={"dtype": dtype}))
            if is_number(arg)
            else arg
            for arg in args
        ]
    elif not _added(draft, node) and _scaled(node, draft) is None:
        return node
    args = [Ref(_numbers_apart(draft, draft.nodes[arg.name]).name) if isinstance(arg, Ref) else arg for arg in args]
    if tuple(args) == node.args and op == node.op:
        return node
    return draft.nodes[draft.emit(op, *args, shape=(), dtype=node.meta.dtype, options=node.kwargs)]


def _is_number(node: Node) -> bool:
    return node.op == "aten.full" and node.args[0] == ()


def _is_zero(node: Node) -> bool:
    """What a sum of losses in a loop begins with."""
    return node.op == "aten.zeros" or (_is_number(node) and node.args[1] == 0)


def _for_each(draft: Draft, number: Node, total: Ref) -> Ref:
    """A number for each element that ``total`` adds up: wherever the elements are split, so is this."""
    elements = draft.nodes[total.name].args[0]
    shape = draft.shape(elements)
    like = Ref(draft.emit("aten.detach", elements, shape=shape))
    filled = Ref(draft.emit("aten.full_like", like, number.args[1], shape=shape))
    return draft.cast(Ref(draft.emit("aten.sum", filled, shape=())), number.meta.dtype)


def _divided_terms(draft: Draft, node: Node, size: Size | None) -> Node:
    """``node`` with a division by a size of the batch (or by ``size``) moved to each of its terms."""
    if node.kind == "op" and node.op == "aten.div" and len(node.args) == 2 and isinstance(node.args[1], Size):
        if size is None and isinstance(node.args[0], Ref):
            return _divided_terms(draft, draft.nodes[node.args[0].name], node.args[1])
        return node
    if terms := _added(draft, node):
        parts: tuple[Any, ...] = tuple(Ref(_divided_terms(draft, term, size).name) for term in terms)
    elif (inner := _scaled(node, draft)) is not None:
        moved = Ref(_divided_terms(draft, draft.nodes[inner.name], size).name)
        parts = tuple(moved if arg == inner else arg for arg in node.args)
    elif size is None:
        return node
    else:
        return draft.nodes[draft.emit("aten.div", Ref(node.name), size, shape=(), dtype=node.meta.dtype)]
    if parts == node.args:
        return node
    return draft.nodes[draft.emit(node.op, *parts, shape=(), dtype=node.meta.dtype)]


def _sum_of(draft: Draft, node: Node, totals: Mapping[str, Ref]) -> Ref:
    """``node`` with ``totals`` in place of its terms."""
    if node.name in totals:
        return totals[node.name]
    if terms := _added(draft, node):
        return Ref(draft.emit(node.op, *(_sum_of(draft, x, totals) for x in terms), shape=(), dtype=node.meta.dtype))
    inner = _scaled(node, draft)
    assert inner is not None
    total = _sum_of(draft, draft.nodes[inner.name], totals)
    args = tuple(total if arg == inner else arg for arg in node.args)
    return Ref(draft.emit(node.op, *args, shape=(), dtype=node.meta.dtype))


def _by_targets(draft: Draft, term: Ref, count: OpGraph) -> Ref:
    """``term`` times the number of targets in the micro-batch."""
    if not count.nodes:
        return term
    dtype = draft.meta(term).dtype
    return Ref(draft.emit("aten.mul", term, _counted(draft, count, term), shape=(), dtype=dtype))


def _counted(draft: Draft, count: OpGraph, like: Ref) -> Ref | int:
    """What ``count`` counts in the micro-batch, computed in ``draft``, in the dtype of ``like``."""
    if not count.nodes:
        return 1
    names: dict[str, str] = {}
    for node in count.nodes.values():
        if node.kind != "op":
            alike = (own for own in draft.nodes.values() if (own.kind, own.target) == (node.kind, node.target))
            names[node.name] = next(alike).name
        elif node.op == "aten.full":  # a size: as many ones, added up
            ones = draft.emit(
                node.op, (node.args[1],), 1, shape=(node.args[1],), dtype="int64", options={"dtype": "int64"}
            )
            names[node.name] = draft.emit("aten.sum", Ref(ones), shape=(), dtype="int64")
        else:
            args, options = map_refs(node.args, names.__getitem__), map_refs(node.kwargs, names.__getitem__)
            names[node.name] = draft.emit(node.op, *args, shape=node.meta.shape, dtype=node.meta.dtype, options=options)
    return draft.cast(Ref(names[count.outputs[0]]), draft.meta(like).dtype)


def _scaled(node: Node, draft: Draft) -> Ref | None:
    """The loss that ``node`` casts, multiplies or divides by a number, or by one that parameters alone make."""
    if node.kind == "op" and node.op in ("aten.mul", "aten.div", "autopar.cast", "aten.neg") and not node.kwargs:
        tensors = [arg for arg in node.args if isinstance(arg, Ref)]
        if len(tensors) == 1 and all(isinstance(arg, Ref | str) or is_number(arg) for arg in node.args):
            return tensors[0]
        if len(tensors) == 2 == len(node.args) and node.meta.shape == ():
            free = [not _reads_batch(draft, arg) for arg in tensors]
            if free == [False, True] or (free == [True, False] and node.op == "aten.mul"):
                return tensors[free.index(False)]
    return None


def _reads_batch(draft: Draft, value: Ref) -> bool:
    """Whether a value follows from the batch, or from its size."""
    seen, pending = set(), [value.name]
    while pending:
        node = draft.nodes[name := pending.pop()]
        if node.kind == "input" or any(isinstance(arg, Size) for arg in node.args):
            return True
        seen.add(name)
        pending += [operand for operand in node.operands() if operand not in seen]
    return False


def _base(draft: Draft, node: Node) -> tuple[Ref, OpGraph]:
    if node.op == "aten.cross_entropy_loss":
        return _cross_entropy(draft, node)
    if node.op in ("aten.nll_loss_nd", "aten.nll_loss"):
        logs = _classes_last(draft, node.args[0])
        if logs and logs.args[1] == len(logs.meta.shape) - 1 and not logs.kwargs:
            return _cross_entropy(draft, replace(node, args=(logs.args[0], *node.args[1:])))
    if node.op == "aten.div" and isinstance(node.args[1], Size):
        total, own = _base(draft, draft.nodes[node.args[0].name])
        if own == NO_COUNT and divide(node.args[1], BATCH) is not None:
            return total, _constant_count(node.args[1])
    elif node.op == "aten.div" and (found := _over_count(draft, node)) is not None:
        return found
    if node.op in ("aten.mean", "aten.sum") and (
        len(node.args) == 1 or len(node.args[1]) == len(draft.shape(node.args[0]))
    ):
        return _total(draft, node, node.args[0], node.op == "aten.mean")
    what = f"ends in {node.op}" if node.kind == "op" else "does not depend on the model"
    raise NoMeanError(f"the loss {what} (module {node.module!r}), which is not a sum over a count; {ACCEPTED}")


def _weighted(draft: Draft, node: Node) -> bool:
    """Whether ``node`` is a sum over a sum of weights that are no whole numbers of the batch (drawn, or given)."""
    if node.op != "aten.div" or len(node.args) != 2 or not all(isinstance(arg, Ref) for arg in node.args):
        return False
    total, weight = node.args
    while inner := draft.producer(total, "autopar.cast"):
        total = inner.args[0]
    added = draft.producer(total, "aten.sum")
    return added is not None and draft.shape(total) == () and not draft.meta(weight).requires_grad


SMALL = 1e-6
"""What may be added to a count so that it is not zero."""


def _over_count(draft: Draft, node: Node) -> tuple[Ref, OpGraph] | None:
    """A sum over the batch, divided by a sum of whole numbers (or of a mask) computed from batch tensors alone."""
    total, count = node.args
    while draft.nodes[total.name].op == "autopar.cast":
        total = draft.nodes[total.name].args[0]
    added = draft.producer(total, "aten.sum")
    if added is None or not isinstance(count, Ref) or len(added.args) > 1 or draft.meta(count).requires_grad:
        return None
    while (ends := draft.nodes[count.name]).op != "aten.sum":
        number: Any = ends.args[1] if len(ends.args) > 1 else ends.kwargs.get("min")
        small = is_number(number) and abs(number) <= (1 if ends.op in ("aten.clamp", "aten.clamp_min") else SMALL)
        if ends.kind != "op" or not (
            ends.op == "autopar.cast" or (ends.op in ("aten.add", "aten.clamp", "aten.clamp_min") and small)
        ):
            return None
        count = ends.args[0]
    whole = _uncounted(draft, ends.args[0])
    if len(ends.args) > 1 or draft.meta(whole).dtype not in ("bool", "int64", "int32"):
        return None
    terms, _ = _total(draft, node, added.args[0], mean=False)
    return terms, _summed(_leading_to(draft, whole), whole)


def _uncounted(draft: Draft, value: Ref) -> Ref:
    """``value`` before casts."""
    while inner := draft.producer(value, "autopar.cast"):
        value = inner.args[0]
    return value


def _classes_last(draft: Draft, value: Ref) -> Node | None:
    """The log-softmax that ``value`` is, also where it is seen as [n, classes] after: then one of the flattened."""
    if not (flat := draft.producer(value, "aten.flatten")):
        return draft.producer(value, "aten.log_softmax")
    logs = draft.producer(flat.args[0], "aten.log_softmax")
    rank = len(draft.shape(flat.args[0]))
    if not logs or flat.args[1:] != (0, rank - 2) or logs.args[1] != rank - 1:
        return None
    return replace(logs, args=(draft.flatten(logs.args[0], 0, rank - 2), 1, *logs.args[2:]), meta=flat.meta)


def _total(draft: Draft, node: Node, terms: Ref, mean: bool) -> tuple[Ref, OpGraph]:
    numel: int | Size = 1
    for size in draft.shape(terms):
        numel = numel * size
    if divide(numel, BATCH) is None or not draft.meta(terms).requires_grad:
        raise NoMeanError(f"the loss sums a tensor of shape {draft.shape(terms)} that has no batch dim; {ACCEPTED}")
    total = Ref(draft.emit("aten.sum", terms, shape=(), dtype=node.meta.dtype))
    return total, _constant_count(numel) if mean else NO_COUNT


NO_COUNT = OpGraph({}, ())
"""The count of a loss that is a plain sum: nothing is divided by."""


def _constant_count(numel: int | Size) -> OpGraph:
    counted = Draft()
    name = counted.emit("aten.full", (), numel, shape=(), dtype="int64")
    node = counted.nodes[name]
    return OpGraph({"count": replace(node, name="count", kwargs={"dtype": "int64"})}, ("count",))


def _cross_entropy(draft: Draft, node: Node) -> tuple[Ref, OpGraph]:
    """Logits [..., v] unflattened and uncast; labels [...]; what is not plain was taken apart when it was imported."""
    names = ("logits", "labels", "weight", "reduction", "ignore", "smoothing")
    given = dict(zip(names, node.args, strict=False))
    reduction, ignore = given.get("reduction", MEAN), given.get("ignore", -100)
    logits, labels = _uncast(draft, node.args[0]), _uncast(draft, node.args[1])
    if len(draft.shape(logits)) > 2:  # torch puts the classes at dim 1
        logits = draft.permute(logits, (0, *range(2, len(draft.shape(logits))), 1))
    flat_logits, flat_labels = draft.producer(logits, "aten.flatten"), draft.producer(labels, "aten.flatten")
    if flat_logits and flat_labels and flat_logits.args[1] == 0:
        whole = flat_logits.args[0]
        if draft.shape(whole)[:-1] == draft.shape(flat_labels.args[0]):
            logits, labels = _uncast(draft, whole), flat_labels.args[0]
    if draft.shape(logits)[:-1] != draft.shape(labels):
        raise FixedSequenceError(
            f"the loss compares scores of shape {draft.shape(logits)[:-1]} with targets of shape {draft.shape(labels)}"
        )
    total = Ref(draft.emit("autopar.cross_entropy", logits, labels, ignore, shape=(), dtype="float32"))
    if smoothing := given.get("smoothing", 0.0):
        total = _smoothed(draft, total, logits, labels, ignore, smoothing)
    return total, NO_COUNT if reduction == SUM else _valid_count(draft, labels, ignore)


def _smoothed(draft: Draft, total: Ref, logits: Ref, labels: Ref, ignore: int, smoothing: float) -> Ref:
    """``total`` mixed with the mean cross-entropy of all classes, at the targets that count (arXiv 1512.00567,
    section 7)."""
    shape = draft.shape(logits)
    logs = draft.emit("aten.log_softmax", draft.cast(logits, "float32"), len(shape) - 1, shape=shape, dtype="float32")
    none = Ref(draft.emit("aten.eq", labels, ignore, shape=draft.shape(labels), dtype="bool"))
    none = draft.unsqueeze(none, len(shape) - 1)
    counted = draft.emit("aten.masked_fill", Ref(logs), none, 0.0, shape=shape, dtype="float32")
    mean = Ref(draft.emit("aten.mean", Ref(counted), (len(shape) - 1,), shape=shape[:-1], dtype="float32"))
    summed = Ref(draft.emit("aten.sum", mean, shape=(), dtype="float32"))
    spread = Ref(draft.emit("aten.mul", summed, -smoothing, shape=(), dtype="float32"))
    kept = Ref(draft.emit("aten.mul", total, 1.0 - smoothing, shape=(), dtype="float32"))
    return Ref(draft.emit("aten.add", kept, spread, shape=(), dtype="float32"))


def _uncast(draft: Draft, value: Ref) -> Ref:
    """The composite widens by itself; what only flattens or casts before it goes."""
    inner = draft.producer(value, "autopar.cast")
    if inner and draft.meta(inner.args[0]).dtype in ("compute", "int64"):
        return inner.args[0]  # type: ignore[no-any-return]
    return value


def _valid_count(draft: Draft, labels: Ref, ignore: int) -> OpGraph:
    """sum(labels != ignore), as a graph from batch tensors."""
    counted = _leading_to(draft, labels)
    return _summed(counted, Ref(counted.emit("aten.ne", labels, ignore, shape=counted.shape(labels), dtype="bool")))


def _leading_to(draft: Draft, value: Ref) -> Draft:
    """What of ``draft`` computes ``value``, from batch tensors."""
    needed = {value.name}
    for node in reversed(draft.nodes.values()):
        if node.name in needed:
            needed.update(node.operands())
    counted = Draft({name: node for name, node in draft.nodes.items() if name in needed}, constant=set(draft.constant))
    if any(node.kind == "parameter" for node in counted.nodes.values()):
        raise BadInputError(f"the targets of the loss, or their number, depend on parameters; {ACCEPTED}")
    return counted


def _summed(counted: Draft, whole: Ref) -> OpGraph:
    """The sum of whole numbers, as a graph."""
    total = counted.emit("aten.sum", whole, shape=(), dtype="int64")
    inputs = {node.name: leaf_name(node.target) for node in counted.nodes.values() if node.kind == "input"}
    return named(list(live(replace(counted, output=total)).nodes.values()), (total,), inputs)[0]
