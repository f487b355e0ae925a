"""Counts of whole numbers by `torch.histc`, as routers count the tokens of each expert.

torch has them on GPUs alone; models are traced, proved and tried on the CPU. There the numbers are counted as float32,
which holds each of them (an expert's, a class's) exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def whole_numbers_counted() -> Iterator[None]:
    """While open, `torch.histc` takes tensors of whole numbers, and counts in their dtype."""
    plain = torch.histc

    def histc(input: Tensor, *args: Any, **options: Any) -> Tensor:
        if input.is_floating_point():
            return plain(input, *args, **options)
        return plain(input.float(), *args, **options).to(input.dtype)

    owners: tuple[Any, ...] = (torch, Tensor)
    before = [owner.histc for owner in owners]
    for owner in owners:
        owner.histc = histc
    try:
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            owner.histc = old
