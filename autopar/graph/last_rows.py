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

from autopar.graph.picks import Pick, Picks

_VIEWS = (torch.Tensor.view, torch.Tensor.reshape)
_EVERY = slice(None)


class _LastRows(Picks):
    """``grouped``: by the id of a tensor [b, n / b, d] of what was picked, that itself and what it was picked of."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped: dict[int, tuple[Tensor, Pick]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__ and id(args[0]) in self.grouped:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            plain = all(isinstance(part, int | slice) for part in index)
            if plain and index in ((_EVERY, -1), (_EVERY, -1, _EVERY)):
                pick = self.grouped[id(args[0])][1]
                return _last(pick.whole, pick.mask)
        result = super().__torch_function__(func, types, args, kwargs)
        if func in _VIEWS and result.ndim == 3 and (picked := self.of(args[0])) is not None and picked.mask.ndim == 2:
            sizes = args[1] if isinstance(args[1], tuple | list | torch.Size) else args[1:]
            if sizes[1] == -1 and (sizes[0], sizes[2]) == (picked.whole.shape[0], picked.whole.shape[2]):
                self.grouped[id(result)] = (result, picked)
        return result


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
