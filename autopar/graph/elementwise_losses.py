"""Losses that compare two tensors element by element: the elements, and their mean or sum.

Taken apart so, they are operators that split along any dim, and a loss as `autopar.graph.losses` takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autopar.graph.draft import Draft
from autopar.graph.ir import Ref

NONE, MEAN, SUM = range(3)  # at::Reduction


def reduced(draft: Draft, terms: Ref, reduction: int) -> Ref:
    """The terms, or their mean or sum."""
    if reduction == NONE:
        return terms
    return Ref(draft.emit("aten.mean" if reduction == MEAN else "aten.sum", terms, shape=()))


def mse_loss(draft: Draft, x: Ref, y: Ref, reduction: int = MEAN) -> Ref:
    difference = Ref(draft.emit("aten.sub", x, y, shape=draft.broadcast(x, y)))
    shape = draft.shape(difference)
    return reduced(draft, Ref(draft.emit("aten.mul", difference, difference, shape=shape)), reduction)


def l1_loss(draft: Draft, x: Ref, y: Ref, reduction: int = MEAN) -> Ref:
    difference = Ref(draft.emit("aten.sub", x, y, shape=draft.broadcast(x, y)))
    return reduced(draft, Ref(draft.emit("aten.abs", difference, shape=draft.shape(difference))), reduction)


def _own_elements(name: str, tensors: int = 0) -> Callable[..., Ref]:
    """A loss that stays an operator, without its reduction, which comes after two tensors and ``tensors`` optional
    ones."""

    def loss(draft: Draft, x: Ref, y: Ref, *rest: Any, **options: Any) -> Ref:
        reduction = rest[tensors] if len(rest) > tensors else MEAN
        given = (*rest[:tensors], *(None,) * (tensors - len(rest)), NONE, *rest[tensors + 1 :])
        shape = draft.broadcast(x, y)
        return reduced(draft, Ref(draft.emit(f"aten.{name}", x, y, *given, shape=shape, options=options)), reduction)

    return loss


ELEMENTWISE_LOSSES: dict[str, Callable[..., Ref]] = {
    "mse_loss": mse_loss,
    "l1_loss": l1_loss,
    **{name: _own_elements(name) for name in ("smooth_l1_loss", "huber_loss", "kl_div")},
    "binary_cross_entropy": _own_elements("binary_cross_entropy", 1),
    "binary_cross_entropy_with_logits": _own_elements("binary_cross_entropy_with_logits", 2),
}
