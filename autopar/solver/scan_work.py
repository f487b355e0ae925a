"""FLOP and bytes of the scans of state-space models, as `codegen/runtime/scans.py` computes them.

Products of one head: with c chunks of l positions, heads of width p and states of n numbers, the chunked scan does
``c (l*l*n + l*l*p + 2*l*p*n)`` multiply-adds, of any number of groups (arXiv 2405.21060, section 6.3). Mamba's scan has
a decay for each channel and state, so it has no such products: it streams its states [b, d, s, n] instead.
"""

from __future__ import annotations

from math import ceil, log2, prod

Products = tuple[tuple[int, int, int, int], ...]
"""(batch, m, n, k) of each matrix product."""


def selective(x: tuple[int, ...], states: int) -> tuple[Products, int, int]:
    """Of Mamba's scan of x [b, d, s]: products, elements streamed in one direction, kernels.

    Of the states' size: five passes to make decays and additions and to read the result; for each doubling thirteen
    (two shifts, two products, one sum).
    """
    batch, channels, length = x
    rounds = ceil(log2(length)) if length > 1 else 0
    return ((batch * length, channels, 1, states),), (5 + 13 * rounds) * prod(x) * states, 8 + 7 * rounds


def chunked(x: tuple[int, ...], states: int, chunk: int) -> tuple[Products, int, int]:
    """Of Mamba-2's scan of x [b, s, h, p]: products, elements streamed in one direction, kernels.

    Six passes over the decays between positions [b, s, chunk, h]; reads and writes of what each group's heads share,
    and of the chunks' states in every doubling.
    """
    batch, length, heads, width = x
    chunks = ceil(length / chunk)
    each = batch * chunks * heads
    rounds = ceil(log2(chunks)) if chunks > 1 else 0
    streamed = (
        6 * each * chunk * chunk + 4 * each * chunk * (states + width) + (2 + 13 * rounds) * each * width * states
    )
    return (
        (
            (each, chunk, chunk, states),
            (each, chunk, width, chunk),
            (each, width, states, chunk),
            (each, chunk, width, states),
        ),
        streamed,
        30 + 7 * rounds,
    )
