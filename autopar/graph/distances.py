"""Distances of vectors, and the losses that are made of them: each of single samples, so that samples go apart.

Formulas are those of torch's documentation of the losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autopar.graph.draft import Draft
from autopar.graph.elementwise_losses import MEAN, reduced
from autopar.graph.ir import Ref

LEAST = 1e-12
"""Added to squares of lengths by torch's cosine embedding loss."""


def _of(draft: Draft, op: str, x: Ref, *others: Any) -> Ref:
    shape = draft.shape(x)
    for other in others:
        shape = draft.broadcast(x, other) if isinstance(other, Ref) else shape
    return Ref(draft.emit(f"aten.{op}", x, *others, shape=shape))


def _reduce(draft: Draft, op: str, x: Ref, *rest: Any, keep: bool = False) -> Ref:
    """Along the last dim."""
    *lead, _ = draft.shape(x)
    given = (*rest, (len(lead),), *((True,) if keep else ()))
    return Ref(draft.emit(f"aten.{op}", x, *given, shape=(*lead, 1) if keep else lead))


def pairwise_distance(draft: Draft, x: Ref, y: Ref, p: float = 2.0, eps: float = 1e-6, keep: bool = False) -> Ref:
    """x, y [..., d] -> [...]."""
    return _reduce(draft, "linalg_vector_norm", _of(draft, "add", _of(draft, "sub", x, y), eps), p, keep=keep)


def cosine_similarity(draft: Draft, x: Ref, y: Ref, dim: int = 1, eps: float = 1e-8) -> Ref:
    """The cosine of the angle between vectors along ``dim``."""
    product = _of(draft, "mul", x, y)
    shape = draft.shape(product)
    dim %= len(shape)
    left = (*shape[:dim], *shape[dim + 1 :])
    lengths = []
    for one in (x, y):
        whole = one if draft.shape(one) == shape else draft.expand(one, shape)
        length = Ref(draft.emit("aten.linalg_vector_norm", whole, 2, (dim,), shape=left))
        lengths.append(_of(draft, "clamp_min", length, eps))
    dot = Ref(draft.emit("aten.sum", product, (dim,), shape=left))
    return _of(draft, "div", dot, _of(draft, "mul", *lengths))


def triplet_margin_loss(
    draft: Draft,
    anchor: Ref,
    positive: Ref,
    negative: Ref,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: int = MEAN,
) -> Ref:
    """Vectors [..., d]: how much farther the positive is than the negative, less a margin."""
    near, far = (pairwise_distance(draft, anchor, other, p, eps) for other in (positive, negative))
    if swap:
        far = _of(draft, "minimum", far, pairwise_distance(draft, positive, negative, p, eps))
    return reduced(draft, _of(draft, "relu", _of(draft, "add", _of(draft, "sub", near, far), margin)), reduction)


def margin_ranking_loss(draft: Draft, x: Ref, y: Ref, target: Ref, margin: float = 0.0, reduction: int = MEAN) -> Ref:
    """target 1: x is to be the larger, -1: y."""
    wrong = _of(draft, "neg", _of(draft, "mul", _of(draft, "sub", x, y), target))
    return reduced(draft, _of(draft, "relu", _of(draft, "add", wrong, margin)), reduction)


def soft_margin_loss(draft: Draft, x: Ref, target: Ref, reduction: int = MEAN) -> Ref:
    """log(1 + exp(-target x))."""
    return reduced(draft, _of(draft, "softplus", _of(draft, "neg", _of(draft, "mul", x, target))), reduction)


def cosine_embedding_loss(draft: Draft, x: Ref, y: Ref, target: Ref, margin: float = 0.0, reduction: int = MEAN) -> Ref:
    """Vectors [..., d]; target 1: 1 - cosine, -1: cosine less the margin, or zero."""
    dot = _reduce(draft, "sum", _of(draft, "mul", x, y))
    squares = [_of(draft, "add", _reduce(draft, "sum", _of(draft, "mul", one, one)), LEAST) for one in (x, y)]
    cosine = _of(draft, "div", dot, _of(draft, "sqrt", _of(draft, "mul", *squares)))
    like = _of(draft, "rsub", cosine, 1)
    unlike = _of(draft, "relu", _of(draft, "sub", cosine, margin))
    chosen = Ref(draft.emit("aten.gt", target, 0, shape=draft.shape(target), dtype="bool"))
    shape, dtype = draft.shape(like), draft.meta(like).dtype
    return reduced(draft, Ref(draft.emit("aten.where", chosen, like, unlike, shape=shape, dtype=dtype)), reduction)


DISTANCES: dict[str, Callable[..., Ref]] = {
    "cosine_similarity": cosine_similarity,
    "pairwise_distance": pairwise_distance,
    "triplet_margin_loss": triplet_margin_loss,
    "margin_ranking_loss": margin_ranking_loss,
    "soft_margin_loss": soft_margin_loss,
    "cosine_embedding_loss": cosine_embedding_loss,
}
