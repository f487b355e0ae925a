"""Local implementations of operators whose split needs more than the operator itself on a shard.

Each is a generator that runs on one rank: it yields ``(op, x)`` where ``x`` is to be all-reduced over the axis ("sum",
with type P to I, or "max") and is sent the result, so that one text serves ranks run in lockstep and a rank on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.nn.functional as F

from autopar.graph.ops import WIDE

Collective = tuple[str, torch.Tensor]
Local = Generator[Collective, torch.Tensor, torch.Tensor]


def embedding(rank: int, weight: torch.Tensor, ids: torch.Tensor, *rest: Any) -> Local:
    """Look up the ids this rank's rows hold, zeros for the others; the output is partial. No collective.

    ``rest``: the id whose row gets no gradient, if there is one.
    """
    yield from ()
    rows = weight.shape[0]
    local = ids - rank * rows
    outside = (local < 0) | (local >= rows)
    found = F.embedding(local.masked_fill(outside, 0), weight)
    if rest and rest[0] >= 0:
        found = torch.where((ids == rest[0]).unsqueeze(-1), found.detach(), found)
    return found.masked_fill(outside.unsqueeze(-1), 0.0)


def cross_entropy(rank: int, logits: torch.Tensor, labels: torch.Tensor, ignore: int = -100) -> Local:
    """Summed cross-entropy from this rank's classes; ``logits`` [..., v / ranks], ``labels`` [...] of all classes."""
    wide = logits.to(WIDE.get(logits.dtype, torch.float32))
    classes = wide.shape[-1]
    top = yield "max", wide.detach().amax(-1)
    shifted = wide - top.unsqueeze(-1)
    total = yield "sum", shifted.exp().sum(-1)
    local = labels - rank * classes
    outside = (local < 0) | (local >= classes)
    picked = shifted.gather(-1, local.masked_fill(outside, 0).unsqueeze(-1)).squeeze(-1)
    target = yield "sum", picked.masked_fill(outside, 0.0)
    return (total.log() - target).masked_fill(labels == ignore, 0.0).sum()


VARIANTS: dict[tuple[str, str], Callable[..., Local]] = {
    ("aten.embedding", "vocab"): embedding,
    ("autopar.cross_entropy", "vocab"): cross_entropy,
}
"""By operator and variant name (`Strategy.variant`)."""
