"""The last position that a mask picks of each sample, where all have as many: ``x[mask].view(b, -1, d)[:, -1]``.

So encoder-decoder models find the end of a sequence. How many positions a mask picks no graph can hold; which is the
last of them can be computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_VIEWS = (torch.Tensor.view, torch.Tensor.reshape)
_EVERY = slice(None)


class _LastRows(TorchFunctionMode):
    """By the id of a tensor, that itself, and the whole [b, s, d] and the mask [b, s] that it was picked by:
    ``picked`` [n, d], ``grouped`` [b, n / b, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.picked: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.grouped: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            x, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
            plain = all(isinstance(part, int | slice) for part in index)
            if id(x) in self.grouped and plain and index in ((_EVERY, -1), (_EVERY, -1, _EVERY)):
                return _last(*self.grouped[id(x)][1:])
            result = func(*args)
            if x.ndim == 3 and _picks(index, x):
                self.picked[id(result)] = (result, x, index[0])
            return result
        result = func(*args, **(kwargs or {}))
        if func in _VIEWS and id(args[0]) in self.picked and result.ndim == 3:
            _, whole, mask = self.picked[id(args[0])]
            sizes = args[1] if isinstance(args[1], tuple | list | torch.Size) else args[1:]
            if sizes[1] == -1 and (sizes[0], sizes[2]) == (whole.shape[0], whole.shape[2]):
                self.grouped[id(result)] = (result, whole, mask)
        return result


def _picks(index: tuple[Any, ...], x: Tensor) -> bool:
    mask, *rest = index
    is_mask = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == x.shape[:2]
    return is_mask and rest in ([], [_EVERY])


def _last(whole: Tensor, mask: Tensor) -> Tensor:
    """[b, d]"""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    row = (places * mask).argmax(1)
    return whole.gather(1, row.view(-1, 1, 1).expand(-1, 1, whole.shape[2])).squeeze(1)


@contextlib.contextmanager
def last_rows_found() -> Iterator[None]:
    """While open, the last of what a mask picks of each sample is found by its place."""
    with _LastRows():
        yield
