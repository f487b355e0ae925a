"""Losses of what a mask picks (``F.cross_entropy(logits[mask], labels[mask])``): of all, with the rest left out.

A cross-entropy ignores the targets outside the mask; of losses by elements, those outside count nothing and are not
counted.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.graph.picks import Pick, Picks

_ELEMENTWISE = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.huber_loss,
    F.l1_loss,
    F.mse_loss,
    F.smooth_l1_loss,
)
_SIGNATURES = {func: inspect.signature(func) for func in (F.cross_entropy, *_ELEMENTWISE)}


def picked_loss(picks: Picks, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The loss of what one mask picks of outputs and of targets, from all of them."""
    if func not in _SIGNATURES:
        return None
    bound = _SIGNATURES[func].bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    x, target = picks.of(given["input"]), picks.of(given["target"])
    others = (value for name, value in given.items() if name not in ("input", "target"))
    if not (x and target and x.mask is target.mask) or any(isinstance(value, Tensor) for value in others):
        return None
    return _entropy(x, target, given) if func is F.cross_entropy else _elements(func, x, target, given)


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
    losses = func(**given | {"input": x.whole, "target": target.whole, "reduction": "none"})
    mask = x.mask.reshape(*x.mask.shape, *(1,) * (losses.ndim - x.mask.ndim))
    total = torch.where(mask, losses, 0).sum()
    if given["reduction"] == "sum":
        return total
    mean = total / x.mask.sum()
    each = math.prod(losses.shape[x.mask.ndim :])
    return mean / each if losses.ndim > x.mask.ndim else mean
