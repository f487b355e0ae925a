"""``as_strided`` by sizes and strides alone, where it takes overlapping windows: ``unfold`` says the same.

Models with sliding windows take their chunks so. What a graph can hold is which dim is taken in windows of what width,
every how many positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class StridesFollowed(TorchFunctionMode):
    """While open, ``as_strided`` of a contiguous tensor is ``unfold`` where it can be."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func in (torch.as_strided, torch.Tensor.as_strided):
            found = _windows(*args, **options)
            if found is not None:
                return found
        return func(*args, **options)


def _windows(
    x: Tensor, size: Sequence[Any], stride: Sequence[Any], storage_offset: Any = None, **others: Any
) -> Tensor | None:
    return None if storage_offset or others else windows_of(x, size, stride)


def windows_of(x: Tensor, size: Sequence[Any], stride: Sequence[Any]) -> Tensor | None:
    """``x``, whose elements fill its memory, as ``as_strided`` gives it, if that is dims of which at most one is taken
    in windows; else None."""
    x = x.permute(_outermost_first(x.stride()))
    if not x.is_contiguous() or len(size) != len(stride) or x.storage_offset() != 0:
        return None
    order = _outermost_first(stride)
    found = _ordered(x, [size[dim] for dim in order], [stride[dim] for dim in order])
    return None if found is None else found.permute([order.index(dim) for dim in range(len(order))])


def _outermost_first(stride: Sequence[Any]) -> list[int]:
    """The dims in the order in which memory holds them."""
    return sorted(range(len(stride)), key=lambda dim: stride[dim], reverse=True)


def _ordered(x: Tensor, size: Sequence[Any], stride: Sequence[Any]) -> Tensor | None:
    inner, dim = 1, len(size)
    while dim and stride[dim - 1] == inner:
        dim -= 1
        inner *= size[dim]
    if dim == 0:
        return x.flatten().narrow(0, 0, inner).view(tuple(size)) if x.numel() != inner else x.reshape(tuple(size))
    # Dim - 1 counts windows of dim ``dim``, every `step` rows of `row` elements, over `length` rows.
    if dim == len(size):
        return None
    row = math.prod(size[dim + 1 :])
    total = stride[dim - 2] if dim > 1 else x.numel()
    if stride[dim - 1] % row or total % row:
        return None
    step, length = stride[dim - 1] // row, total // row
    count = (length - size[dim]) // step + 1
    if count < size[dim - 1]:
        return None
    outer, expected = list(size[: dim - 1]), total
    for place in range(dim - 2, -1, -1):
        if stride[place] != expected:
            return None
        expected *= outer[place]
    if expected != x.numel():
        return None
    rows = x.reshape(*outer, length, *size[dim + 1 :])
    windows = rows.unfold(dim - 1, size[dim], step).narrow(dim - 1, 0, size[dim - 1])
    return windows.movedim(-1, dim)
