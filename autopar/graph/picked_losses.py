"""Losses of what a mask picks (``F.cross_entropy(logits[mask], labels[mask])``): of all, with the rest left out.

A cross-entropy ignores the targets outside the mask; of losses by elements, those outside count nothing and are not
counted.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.graph.picks import Pick, Picks

_WRITTEN_OUT: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    F.binary_cross_entropy_with_logits: lambda x, y: F.softplus(x) - x * y,
    F.mse_loss: lambda x, y: (x - y).square(),
    F.l1_loss: lambda x, y: (x - y).abs(),
}
_ELEMENTWISE = (*_WRITTEN_OUT, F.binary_cross_entropy, F.smooth_l1_loss, F.huber_loss)
_SIGNATURES = {func: inspect.signature(func) for func in (F.cross_entropy, *_ELEMENTWISE)}


class _Losses(Picks):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SIGNATURES:
            bound = _SIGNATURES[func].bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            given = bound.arguments
            x, target = self.of(given["input"]), self.of(given["target"])
            others = (value for name, value in given.items() if name not in ("input", "target"))
            if x and target and x.mask is target.mask and not any(isinstance(value, Tensor) for value in others):
                found = _entropy(x, target, given) if func is F.cross_entropy else _elements(func, x, target, given)
                if found is not None:
                    return found
        return super().__torch_function__(func, types, args, kwargs)


def _entropy(x: Pick, target: Pick, given: dict[str, Any]) -> Tensor | None:
    """Logits [..., c], class indices [...]."""
    dims = x.mask.ndim
    if x.whole.ndim != dims + 1 or target.whole.ndim != dims or target.whole.is_floating_point():
        return None
    if given["reduction"] == "none":
        return None
    labels = torch.where(x.mask, target.whole, given["ignore_index"])
    if dims > 1:
        labels = labels.flatten()
    logits = x.whole.flatten(0, dims - 1) if dims > 1 else x.whole
    return F.cross_entropy(**given | {"input": logits, "target": labels})


def _elements(func: Any, x: Pick, target: Pick, given: dict[str, Any]) -> Tensor | None:
    if x.whole.shape != target.whole.shape or given["reduction"] not in ("mean", "sum"):
        return None
    if given.get("size_average") is not None or given.get("reduce") is not None:
        return None
    if func in _WRITTEN_OUT:
        losses = _WRITTEN_OUT[func](x.whole, target.whole)
    else:
        losses = func(**given | {"input": x.whole, "target": target.whole, "reduction": "none"})
    mask = x.mask.reshape(*x.mask.shape, *(1,) * (losses.ndim - x.mask.ndim))
    total = torch.where(mask, losses, 0).sum()
    if given["reduction"] == "sum":
        return total
    mean = total / x.mask.sum()
    each = math.prod(losses.shape[x.mask.ndim :])
    return mean / each if losses.ndim > x.mask.ndim else mean


@contextlib.contextmanager
def picked_losses() -> Iterator[None]:
    """While open, losses of what one mask picks of outputs and of targets are those of all."""
    with _Losses():
        yield
