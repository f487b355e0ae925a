"""The last position that a mask picks of each sample, where all have as many: ``x[mask].view(b, -1, d)[:, -1]``.

So encoder-decoder models find the end of a sequence. How many positions a mask picks no graph can hold; which is the
last of them can be computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.graph.picks import EVERY, Picks


def last_row(picks: Picks, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """[b, d]: the last of what a mask [b, s] picks of each sample, found by its place."""
    if func is not torch.Tensor.__getitem__ or (view := picks.grouped(args[0])) is None:
        return None
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not all(isinstance(part, int | slice) for part in index) or index not in ((EVERY, -1), (EVERY, -1, EVERY)):
        return None
    whole, mask = view.pick.whole, view.pick.mask
    if mask.ndim != 2 or whole.ndim != 3 or view.sizes != (whole.shape[0], -1, whole.shape[2]):
        return None
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    row = (places * mask).argmax(1)
    return whole.gather(1, row.view(-1, 1, 1).expand(-1, 1, whole.shape[2])).squeeze(1)
