"""What work is made of: a rank's tensors, matrix products, attention, and the bytes and kernels of one direction."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple


class LocalTensor(NamedTuple):
    """One rank's piece of a tensor (a named tuple, because prices are looked up by it: its hash must be cheap)."""

    shape: tuple[int, ...]
    bytes_per_element: int

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.bytes_per_element

    @property
    def outer(self) -> int:
        """How many of the outermost dims have one element, up to the first that has another number."""
        return next((place for place, size in enumerate(self.shape) if size != 1), len(self.shape))


class Matmul(NamedTuple):
    """``batch`` products of (m, k) and (k, n)."""

    batch: int
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True, slots=True)
class Attention:
    """Fused attention of ``batch`` (samples times query heads) problems; ``matmuls``: 2 forward, 5 backward.
    ``balanced``: whether queries split by position are chunks from both ends of the sequence, if they can be;
    ``pieces``: the runs of the kernel that share the keys."""

    batch: int
    queries: int
    keys: int
    head_dim: int
    causal: bool
    matmuls: int
    balanced: bool = True
    pieces: int = 1

    @property
    def share(self) -> float:
        """The part of all keys that a query reads on average; blocks above the diagonal are skipped.

        Fewer queries than keys are one rank's, split by position: half of all keys where each rank takes a chunk from
        both ends of the sequence, which an even number of queries allows; else what the last rank reads.
        """
        if not self.causal:
            return 1.0
        from_both_ends = self.balanced and self.queries % 2 == 0
        if from_both_ends or self.queries >= self.keys:
            return 0.5
        return 1 - self.queries / self.keys / 2

    @property
    def flops(self) -> float:
        """FLOP done."""
        return 2 * self.matmuls * self.batch * self.queries * self.keys * self.head_dim * self.share


@dataclass(frozen=True, slots=True)
class Work:
    """One direction of one operator: its matmul-like parts, other bytes moved, and how many kernels it launches.

    ``nbytes`` are moved by streaming kernels and do not overlap with the matmuls, whose own operands are in
    ``matmul_bytes``.
    """

    matmuls: tuple[Matmul, ...] = ()
    attention: Attention | None = None
    matmul_bytes: float = 0.0
    nbytes: float = 0.0
    kernels: float = 0

    @property
    def flops(self) -> float:
        return sum(matmul.flops for matmul in self.matmuls) + (self.attention.flops if self.attention else 0)


NOTHING = Work()

Counted = tuple[Work, Work]
"""Forward and backward work of an operator."""
