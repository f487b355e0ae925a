"""What boolean masks pick of tensors, followed while a model is traced.

How many elements a mask picks no graph can hold. But where what is done with them is known, the same can be computed
from the whole tensor and the mask: such uses (`ctc`, `last_rows`, `picked_losses`) look up here what a tensor was
picked of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

EVERY = slice(None)
_SELECTS = (torch.masked_select, torch.Tensor.masked_select)
_CASTS = (torch.Tensor.to, torch.Tensor.float, torch.Tensor.double, torch.Tensor.long, torch.Tensor.int)
_SAME = (*_CASTS, torch.Tensor.contiguous)
_VIEWS = (torch.Tensor.view, torch.Tensor.reshape)


@dataclass(frozen=True, slots=True)
class Pick:
    """``result`` [n, ...] is ``whole`` [*dims of the mask, ...] where the ``mask`` is true."""

    result: Tensor
    whole: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Grouped:
    """``result`` is what was picked, viewed in these ``sizes``."""

    result: Tensor
    pick: Pick
    sizes: tuple[Any, ...]


Use = Callable[["Picks", Any, tuple[Any, ...], dict[str, Any]], Tensor | None]
"""What a call gives, if it is a use of picks that is known; else None."""


class Picks(TorchFunctionMode):
    """Knows, while open, what each tensor was picked of, and computes what ``uses`` know from the whole; casts and
    views are followed."""

    def __init__(self, *uses: Use) -> None:
        super().__init__()
        self._uses = uses
        self._known: dict[int, Pick] = {}
        self._grouped: dict[int, Grouped] = {}

    def of(self, x: Any) -> Pick | None:
        return self._known.get(id(x))

    def grouped(self, x: Any) -> Grouped | None:
        return self._grouped.get(id(x))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        for use in self._uses:
            if (found := use(self, func, args, options)) is not None:
                return found
        result = func(*args, **options)
        if len(args) == 2 and (mask := _mask_of(func, *args)) is not None:
            self._known[id(result)] = Pick(result, args[0], mask)
        elif args and (pick := self.of(args[0])) is not None:
            if func in _SAME:
                self._known[id(result)] = Pick(result, func(pick.whole, *args[1:], **options), pick.mask)
            elif func in _VIEWS and result.ndim == args[0].ndim and result.shape[1:] == args[0].shape[1:]:
                self._known[id(result)] = Pick(result, pick.whole, pick.mask)
            elif func in _VIEWS:
                sizes = args[1] if isinstance(args[1], tuple | list) else args[1:]
                self._grouped[id(result)] = Grouped(result, pick, tuple(sizes))
        return result


def _mask_of(func: Any, x: Any, index: Any) -> Tensor | None:
    """The mask by which ``func`` picks elements of ``x``, if it does."""
    if func is torch.Tensor.__getitem__ and isinstance(index, tuple) and index and set(map(type, index[1:])) <= {slice}:
        index = index[0] if all(part == EVERY for part in index[1:]) else None
    elif func is not torch.Tensor.__getitem__ and func not in _SELECTS:
        return None
    if not isinstance(index, Tensor) or index.dtype != torch.bool or not index.ndim:
        return None
    return index if x.shape[: index.ndim] == index.shape and (func not in _SELECTS or x.ndim == index.ndim) else None
