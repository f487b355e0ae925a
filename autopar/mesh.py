"""The device mesh: sizes of its axes, and in which order ranks go through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from autopar.errors import BadInputError

AXES = ("pp", "dp", "cp", "tp")
"""The mesh axes, outermost first in the rank order that a mesh has unless it says otherwise."""

Span = tuple[tuple[int, int], ...]
"""Ranks of one group: (how many, how many ranks apart) for each axis it spans, innermost first."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Device mesh: sizes of its axes.

    ``pp``: ranks of the pipeline; ``dp``: ranks that each have samples of their own; ``cp``: context parallel, splits
    activations by sequence and no parameter; ``tp``: splits operators. ``tp_parts``: the sizes of the mesh axes that
    tp is made of, outermost first, where operators split it in several ways (8 as 2 x 4); empty where it is one axis.
    ``order``: the axes as ranks go through them, outermost first: neighbours on the last one have neighbouring ranks,
    and nodes hold neighbouring ranks, so it says which axes lie inside a node.
    ``ep``: neighbouring data ranks (those of cp first) that share the experts of a mixture: no axis of its own. Raises
    BadInputError for another order than one of `AXES`, parts that do not make tp, or an ep that does not divide.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    tp_parts: tuple[int, ...] = ()
    order: tuple[str, ...] = AXES
    ep: int = 1

    def __post_init__(self) -> None:
        if self.ep < 1 or self.data % self.ep:
            raise BadInputError(f"mesh: ep={self.ep} does not divide the {self.data} data ranks (dp x cp)")
        if self.tp_parts and (prod(self.tp_parts) != self.tp or len(self.tp_parts) < 2 or 1 in self.tp_parts):
            raise BadInputError(f"mesh: tp={self.tp} is not made of the axes {self.tp_parts}")
        if self.order != AXES and sorted(self.order) != sorted(AXES):
            raise BadInputError(f"mesh: order must name each of {', '.join(AXES)} once, not {','.join(self.order)!r}")

    @property
    def size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def data(self) -> int:
        """Ranks that hold the same parameters on the model axes: data and context ranks."""
        return self.dp * self.cp

    def expert_spans(self) -> tuple[Span, Span]:
        """The ranks that share experts, and those that hold the same ones."""
        return cut(self.data_span(), self.ep)

    def axes(self) -> dict[str, int]:
        """All axes, in the order of `AXES`."""
        return {"pp": self.pp, "dp": self.dp, "cp": self.cp, **self._tp_axes()}

    def ranked_axes(self) -> dict[str, int]:
        """All axes as ranks go through them, outermost first."""
        axes = self.axes()
        names = [name for axis in self.order for name in (self._tp_axes() if axis == "tp" else (axis,))]
        return {name: axes[name] for name in names}

    def strides(self) -> dict[str, int]:
        """How many ranks apart neighbours on each axis are."""
        return strides(self.ranked_axes())

    def data_span(self) -> Span:
        """The data ranks, as shard groups count them: those of cp are neighbours, then come those of dp. Axes that
        ranks go through one after the other count as one."""
        if self.order == AXES:
            return ((self.dp * self.cp, self.tp),) if self.data > 1 else ()
        strides = self.strides()
        span = [(size, strides[axis]) for axis, size in (("cp", self.cp), ("dp", self.dp)) if size > 1]
        if len(span) == 2 and span[1][1] == span[0][0] * span[0][1]:
            span = [(self.data, span[0][1])]
        return tuple(span)

    def model_axes(self) -> dict[str, int]:
        """The axes that block decisions are about: context and tensor parallel ones of more than one rank."""
        sizes = {"cp": self.cp, **self._tp_axes()}
        return {axis: size for axis, size in sizes.items() if size > 1}

    def tp_axes(self) -> dict[str, int]:
        """The model axes that parameters may be split on."""
        return {axis: size for axis, size in self._tp_axes().items() if size > 1}

    def _tp_axes(self) -> dict[str, int]:
        if not self.tp_parts:
            return {"tp": self.tp}
        return {f"tp{index}": size for index, size in enumerate(self.tp_parts)}

    def __str__(self) -> str:
        parts = {"pp": str(self.pp), "dp": str(self.dp)}
        if self.cp > 1:
            parts["cp"] = str(self.cp)
        parts["tp"] = "x".join(map(str, self.tp_parts)) or str(self.tp)
        text = " x ".join(f"{axis}={size}" for axis, size in parts.items())
        text += f", ep={self.ep}" if self.ep > 1 else ""
        return text if self.order == AXES else f"{text}, order={','.join(self.order)}"


def strides(axes: Mapping[str, int]) -> dict[str, int]:
    """How many ranks apart neighbours on each axis are; the last axis is the innermost."""
    found, stride = {}, 1
    for axis, size in reversed(list(axes.items())):
        found[axis] = stride
        stride *= size
    return found


def same_ranks(mesh: Mesh) -> tuple[str, ...]:
    """The order that numbers the ranks of ``mesh`` as its own does, with axes of one rank where `AXES` has them."""
    sizes = {"pp": mesh.pp, "dp": mesh.dp, "cp": mesh.cp, "tp": mesh.tp}
    several = iter([axis for axis in mesh.order if sizes[axis] > 1])
    return tuple(axis if sizes[axis] == 1 else next(several) for axis in AXES)


@lru_cache(maxsize=4096)
def cut(span: Span, ranks: int) -> tuple[Span, Span]:
    """The groups of ``ranks`` neighbours that a span is made of: one of them, and the ranks that stand at the same
    place of each. ``ranks`` must divide it so that axes are split once at most (`capabilities.LIMITS`)."""
    inner: list[tuple[int, int]] = []
    outer: list[tuple[int, int]] = []
    for size, stride in span:
        taken = min(size, ranks)
        if size % taken or ranks % taken:
            raise ValueError(f"{span} is not made of groups of {ranks} neighbours")
        ranks //= taken
        inner += [(taken, stride)] if taken > 1 else []
        outer += [(size // taken, stride * taken)] if taken < size else []
    return tuple(inner), tuple(outer)
