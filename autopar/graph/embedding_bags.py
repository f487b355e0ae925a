"""Bags of embeddings, each a row of indices, as the look-ups and the sum, mean or maximum that they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def _taken_apart(
    input: Tensor, weight: Tensor, mode: str, per_sample_weights: Tensor | None, padding_idx: int | None
) -> Tensor:
    """input [b, n], weight [v, d], per_sample_weights [b, n] -> [b, d]; ``padding_idx`` counts nothing."""
    rows = F.embedding(input, weight, padding_idx)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if mode == "max":
        return rows.max(1)[0]
    if padding_idx is None:
        return rows.mean(1) if mode == "mean" else rows.sum(1)
    kept = (input != padding_idx).unsqueeze(-1).to(rows.dtype)
    total = (rows * kept).sum(1)
    return total / kept.sum(1).clamp(min=1) if mode == "mean" else total


@contextlib.contextmanager
def bags_taken_apart() -> Iterator[None]:
    """While open, `F.embedding_bag` of rows of indices is taken apart; what has no such form stays as it is."""
    plain: Any = F.embedding_bag

    def call(
        input: Tensor,
        weight: Tensor,
        offsets: Tensor | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        per_sample_weights: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> Any:
        odd = offsets is not None or max_norm is not None or scale_grad_by_freq or input.is_floating_point()
        if input.ndim == 2 and not odd and (mode != "max" or padding_idx is None):
            return _taken_apart(input, weight, mode, per_sample_weights, padding_idx)
        rest = (norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, padding_idx)
        return plain(input, weight, offsets, max_norm, *rest)

    F.embedding_bag = call
    try:
        yield
    finally:
        F.embedding_bag = plain
