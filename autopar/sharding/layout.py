"""Layouts: for one tensor, one SPMD type per mesh axis, and the order of axes that split a dim.

The types are those of the `spmd_types` package. They say how the ranks of an axis hold a tensor and its gradient:

    R      replicate: every rank holds the whole; gradient P (each rank's gradient is a summand)
    I      invariant: every rank holds the whole; gradient I (every rank holds the whole gradient)
    P      partial: the whole is the sum over ranks; gradient R
    S(d)   sharded on dim d in rank order; gradient S(d)

A dim may be a compound of factors, major first. ``S(d, blocks=n)`` splits a dim seen as ``(n, size/n)`` on its inner
part: each rank holds its slice of each of the n blocks (a fused q/k/v projection split by heads has blocks=3).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache

from autopar.graph.size import Size

CONTEXT = "cp"
"""The mesh axis that splits activations by sequence and holds every parameter whole (context parallelism)."""


@dataclass(frozen=True, slots=True)
class SpmdType:
    """How the ranks of one axis hold a tensor: ``kind`` is "R", "I", "P" or "S"; ``dim``/``blocks`` only for "S"."""

    kind: str
    dim: int = -1
    blocks: int | Size = 1
    _hash: int = field(init=False, repr=False, compare=False)  # a search looks types and layouts up millions of times

    def __post_init__(self) -> None:
        if self.kind not in ("R", "I", "P", "S") or (self.kind == "S") != (self.dim >= 0):
            raise ValueError(f"not an SPMD type: kind {self.kind!r}, dim {self.dim}")
        object.__setattr__(self, "_hash", hash((self.kind, self.dim, self.blocks)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[SpmdType], tuple[str, int, int | Size]]:
        return SpmdType, (self.kind, self.dim, self.blocks)  # hashes of strings differ between processes

    def __str__(self) -> str:
        if self.kind != "S":
            return self.kind
        return f"S({self.dim})" if self.blocks == 1 else f"S({self.dim}, {self.blocks})"

    __repr__ = __str__

    @staticmethod
    def parse(text: str) -> SpmdType:
        """Read what ``str`` prints: "R", "S(1)", "S(2, 3)"."""
        match = re.fullmatch(r"S\((\d+)(?:, (.+))?\)", text)
        if match:
            return S(int(match[1]), Size.parse(match[2]) if match[2] else 1)
        return SpmdType(text)

    @property
    def gradient(self) -> SpmdType:
        """The type of the gradient of a tensor of this type."""
        return {"R": P, "P": R}.get(self.kind, self)


R = SpmdType("R")
I = SpmdType("I")
P = SpmdType("P")


@cache
def S(dim: int, blocks: int | Size = 1) -> SpmdType:
    """Sharded on ``dim`` (seen as ``blocks`` blocks, each split)."""
    return SpmdType("S", dim, blocks)


@dataclass(frozen=True, slots=True, init=False, eq=False)
class Layout:
    """One type per mesh axis, in the order that axes split a dim (outermost first).

    Printed as ``dp:S(0) tp:S(1)``; an axis that is not listed holds the tensor invariant. Equal layouts are one object:
    a search looks them up millions of times.
    """

    types: tuple[tuple[str, SpmdType], ...]
    _hash: int = field(repr=False)

    def __new__(cls, types: tuple[tuple[str, SpmdType], ...] = ()) -> Layout:
        found = _LAYOUTS.get(types)
        if found is None:
            found = object.__new__(cls)
            object.__setattr__(found, "types", types)
            object.__setattr__(found, "_hash", hash(types))
            found = _LAYOUTS.setdefault(types, found)
        return found

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Layout], tuple[tuple[tuple[str, SpmdType], ...]]]:
        return Layout, (self.types,)

    @staticmethod
    def of(**types: SpmdType) -> Layout:
        """``Layout.of(dp=S(0), tp=R)``; the order of the keywords is the order of the splits."""
        return Layout(tuple(types.items()))

    @staticmethod
    def parse(text: str) -> Layout:
        """Read what ``str`` prints."""
        pairs = re.findall(r"(\w+):(\w(?:\([^)]*\))?)", text)
        return Layout(tuple((axis, SpmdType.parse(kind)) for axis, kind in pairs))

    def __getitem__(self, axis: str) -> SpmdType:
        for name, kind in self.types:
            if name == axis:
                return kind
        return I

    def with_type(self, axis: str, kind: SpmdType) -> Layout:
        """This layout with ``axis`` changed; a changed axis becomes the innermost split."""
        rest = tuple((name, old) for name, old in self.types if name != axis)
        return Layout((*rest, (axis, kind)))

    @property
    def gradient(self) -> Layout:
        """How the ranks hold the gradient of a tensor in this layout."""
        return Layout(tuple((axis, kind.gradient) for axis, kind in self.types))

    def splits(self, dim: int) -> tuple[str, ...]:
        """The axes that split ``dim``, outermost first."""
        return tuple(axis for axis, kind in self.types if kind.kind == "S" and kind.dim == dim)

    def __str__(self) -> str:
        return " ".join(f"{axis}:{kind}" for axis, kind in self.types)


_LAYOUTS: dict[tuple[tuple[str, SpmdType], ...], Layout] = {}
"""All there are, of a process: some hundreds."""
