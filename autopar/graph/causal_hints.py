"""Whether a mask is causal, where torch's transformer layers look at its values: the mask itself says it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.modules.transformer as layers


@contextlib.contextmanager
def masks_unread() -> Iterator[None]:
    """While open, `nn.TransformerEncoder` and `nn.TransformerDecoder` take a mask for causal only where they are told.

    It is a hint beside the mask, which is applied all the same (and recognised in the graph, `autopar.graph.masks`).
    """
    plain: Any = layers._detect_is_causal_mask
    layers._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        layers._detect_is_causal_mask = plain
