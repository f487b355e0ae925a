"""Tables of sinusoidal positions, as some models keep in a buffer, become the operator that computes them."""

from __future__ import annotations

import torch

from autopar.graph.buffers import SMALLEST

Table = tuple[int, int, int | None]
"""Rows, width, and the row that is blank, if one is: the arguments of `autopar.sinusoids`."""


def table_of(buffer: torch.Tensor | None) -> Table | None:
    """The arguments with which `sinusoids` gives the very numbers of ``buffer``; None if there are none."""
    if buffer is None or buffer.is_meta or buffer.ndim != 2 or not buffer.is_floating_point():
        return None
    if buffer.numel() < SMALLEST or buffer.shape[0] < 3 or buffer.shape[1] < 4:
        return None
    from autopar.codegen.runtime.position_tables import sinusoids

    rows, width = buffer.shape
    # Two rows tell most buffers apart before the whole is computed.
    if not torch.equal(sinusoids(3, width, dtype=buffer.dtype, device=None)[2], buffer[2]):
        return None
    blank = (buffer == 0).all(1).nonzero().flatten().tolist()
    for row in (*blank, None):
        if torch.equal(sinusoids(rows, width, row, dtype=buffer.dtype, device=None), buffer):
            return rows, width, row
    return None
