"""Cross-entropies other than a sum or mean over class indices: one for each target, with weights of classes, of
probabilities. Taken apart, they are a log-softmax, what it gives the targets, and its reduction.

The plain ones stay one operator, which splits vocabularies (`autopar.graph.losses`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autopar.graph.draft import FLOATING, Draft
from autopar.graph.elementwise_losses import MEAN, NONE, reduced
from autopar.graph.ir import Ref


def cross_entropy_loss(
    draft: Draft, logits: Ref, target: Ref, weight: Ref | None = None, reduction: int = MEAN, *rest: Any
) -> Ref:
    """logits [n, c, ...] or [c], target [n, ...]: class indices, or [n, c, ...]: probabilities."""
    ignore, smoothing = (rest[0] if rest else -100), (rest[1] if len(rest) > 1 else 0.0)
    indices = draft.meta(target).dtype not in FLOATING
    if indices and weight is None and reduction != NONE:
        return Ref(draft.emit("aten.cross_entropy_loss", logits, target, None, reduction, *rest, shape=()))
    logs, dtype, dim = _logs(draft, logits), draft.meta(logits).dtype, min(1, len(draft.shape(logits)) - 1)
    if indices:
        return _of_indices(draft, logs, target, weight, reduction, ignore, smoothing, dtype)
    shape = draft.shape(logs)
    shares = draft.cast(target, "float32")
    if smoothing:
        shares = Ref(draft.emit("aten.mul", shares, 1 - smoothing, shape=shape))
        classes = shape[dim]
        assert isinstance(classes, int)
        shares = Ref(draft.emit("aten.add", shares, smoothing / classes, shape=shape))
    terms = Ref(draft.emit("aten.mul", _weighted(draft, logs, weight, dim), shares, shape=shape))
    return reduced(draft, _negative_sum(draft, terms, dim, dtype), reduction)


def nll_loss(
    draft: Draft, logs: Ref, target: Ref, weight: Ref | None = None, reduction: int = MEAN, ignore: int = -100
) -> Ref:
    """logs [n, c, ...] or [c]: log-probabilities; target [n, ...]: class indices."""
    if weight is None and reduction != NONE:
        return Ref(draft.emit("aten.nll_loss_nd", logs, target, None, reduction, ignore, shape=()))
    return _of_indices(draft, logs, target, weight, reduction, ignore, 0.0, draft.meta(logs).dtype)


def _logs(draft: Draft, logits: Ref) -> Ref:
    shape = draft.shape(logits)
    wide = draft.cast(logits, "float32")
    return Ref(draft.emit("aten.log_softmax", wide, min(1, len(shape) - 1), shape=shape, dtype="float32"))


def _of_indices(
    draft: Draft,
    logs: Ref,
    target: Ref,
    weight: Ref | None,
    reduction: int,
    ignore: int,
    smoothing: float,
    dtype: str,
) -> Ref:
    shape, dim = draft.shape(target), min(1, len(draft.shape(logs)) - 1)
    none = Ref(draft.emit("aten.eq", target, ignore, shape=shape, dtype="bool"))
    index = Ref(draft.emit("aten.masked_fill", target, none, 0, shape=shape))
    place = draft.unsqueeze(index, dim)
    picked = Ref(draft.emit("aten.gather", logs, dim, place, shape=draft.shape(place)))
    terms = Ref(draft.emit("aten.neg", draft.squeeze(picked, dim), shape=shape))
    own = None if weight is None else Ref(draft.emit("aten.index", weight, (index,), shape=shape))
    if own is not None:
        own = Ref(draft.emit("aten.masked_fill", draft.cast(own, draft.meta(logs).dtype), none, 0.0, shape=shape))
        terms = Ref(draft.emit("aten.mul", terms, own, shape=shape))
    if smoothing:
        classes = draft.shape(logs)[dim]
        assert isinstance(classes, int)
        spread = _negative_sum(draft, _weighted(draft, logs, weight, dim), dim, draft.meta(logs).dtype)
        spread = Ref(draft.emit("aten.mul", spread, smoothing / classes, shape=shape))
        terms = Ref(draft.emit("aten.mul", terms, 1 - smoothing, shape=shape))
        terms = Ref(draft.emit("aten.add", terms, spread, shape=shape))
    terms = draft.cast(Ref(draft.emit("aten.masked_fill", terms, none, 0.0, shape=shape)), dtype)
    if own is None or reduction != MEAN:
        return reduced(draft, terms, reduction)
    total = Ref(draft.emit("aten.sum", terms, shape=()))
    return Ref(draft.emit("aten.div", total, Ref(draft.emit("aten.sum", own, shape=())), shape=()))


def _weighted(draft: Draft, logs: Ref, weight: Ref | None, dim: int) -> Ref:
    """``logs`` times the weights of their classes."""
    if weight is None:
        return logs
    shape = draft.shape(logs)
    weight = draft.cast(weight, draft.meta(logs).dtype)
    for _ in range(len(shape) - 1 - dim):
        weight = draft.unsqueeze(weight, len(draft.shape(weight)))
    return Ref(draft.emit("aten.mul", logs, weight, shape=shape))


def _negative_sum(draft: Draft, terms: Ref, dim: int, dtype: str) -> Ref:
    shape = draft.shape(terms)
    total = Ref(draft.emit("aten.sum", terms, (dim,), shape=(*shape[:dim], *shape[dim + 1 :])))
    return draft.cast(Ref(draft.emit("aten.neg", total, shape=draft.shape(total))), dtype)


CROSS_ENTROPIES: dict[str, Callable[..., Ref]] = {
    "cross_entropy_loss": cross_entropy_loss,
    "nll_loss_nd": nll_loss,
    "nll_loss": nll_loss,
}
