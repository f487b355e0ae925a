"""Conversions: how a tensor changes its type on one mesh axis, what that moves forward and backward.

The table lists what the forward does; the backward follows, because the gradient of a tensor of type t has type
t.gradient: going from ``source`` to ``target`` sends the gradient from ``target.gradient`` to ``source.gradient``.

    from \\ to   R            I            P          S(j)
    R           -            (not offered) keep      slice
    I           none         -            keep       slice
    P           all_reduce   all_reduce   -          reduce_scatter
    S(i)        all_gather   all_gather   pad        all_to_all (i != j)

``slice`` keeps this rank's part, ``pad`` puts it into zeros, ``keep`` keeps the value on the axis's first rank and
zeros it elsewhere. None of these communicates. R→I is free as the gradient of P→I, but is not offered forward: its
backward would have to drop the summands of all ranks but one. S(d) in other blocks has no direct conversion.

A tensor without gradient has no backward, and for it R and I are one type (`plain`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

from autopar.sharding.layout import I, Layout, P, R, SpmdType

COMMUNICATES = frozenset({"all_gather", "reduce_scatter", "all_reduce", "all_to_all"})
"""The actions that move data between ranks; the others ("none", "slice", "pad", "keep") stay on the rank."""

_ACTIONS = {
    ("S", "R"): "all_gather",
    ("S", "I"): "all_gather",
    ("S", "P"): "pad",
    ("P", "I"): "all_reduce",
    ("P", "R"): "all_reduce",
    ("P", "S"): "reduce_scatter",
    ("I", "R"): "none",
    ("I", "S"): "slice",
    ("I", "P"): "keep",
    ("R", "S"): "slice",
    ("R", "P"): "keep",
    ("R", "I"): "none",
}
_NOT_OFFERED = frozenset({("R", "I")})


@dataclass(frozen=True, slots=True)
class Step:
    """One conversion on one axis: the action of the forward, and that of the backward on the gradient.

    An action is a collective of `COMMUNICATES` or a local "none", "slice", "pad", "keep". What it moves is
    a fraction of the tensor that is whole on this axis: `forward_bytes` and `backward_bytes`, 1.0 or 0.0. That tensor
    is what `CollectiveCosts.seconds` takes.
    """

    source: SpmdType
    target: SpmdType
    forward: str
    backward: str

    @property
    def forward_bytes(self) -> float:
        return float(self.forward in COMMUNICATES)

    @property
    def backward_bytes(self) -> float:
        return float(self.backward in COMMUNICATES)

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}: {self.forward} / {self.backward}"


def plain(kind: SpmdType, grad: bool) -> SpmdType:
    """``kind``, with I read as R for a tensor without gradient: the two differ in their gradient only."""
    return R if kind == I and not grad else kind


def action(source: SpmdType, target: SpmdType) -> str | None:
    """What takes values (or gradients) from ``source`` to ``target``; None if no single action does."""
    if source == target:
        return "none"
    if source.kind == target.kind == "S":
        return "all_to_all" if source.dim != target.dim else None
    return _ACTIONS.get((source.kind, target.kind))


@cache
def direct(source: SpmdType, target: SpmdType, grad: bool = True) -> Step | None:
    """The single step from ``source`` to ``target``, or None if there is none (or nothing to do: equal types)."""
    if source == target or (grad and (source.kind, target.kind) in _NOT_OFFERED):
        return None
    forward = action(source, target)
    if forward is None:
        return None
    backward = action(target.gradient, source.gradient) if grad else "none"
    assert backward is not None, (source, target)
    return Step(source, target, forward, backward)


@cache
def steps(source: SpmdType, target: SpmdType, grad: bool = True) -> tuple[Step, ...]:
    """The shortest chain of steps: fewest collectives (forward and backward), then fewest steps.

    Empty for equal types. Chains pass through R, I and P only, so that they need not know the tensor's dims.
    """
    if plain(source, grad) == plain(target, grad):
        return ()
    best: dict[SpmdType, tuple[tuple[int, int], tuple[Step, ...]]] = {source: ((0, 0), ())}
    queue = deque([source])
    while queue:
        here = queue.popleft()
        (collectives, length), chain = best[here]
        for there in (target, I, R, P):
            step = direct(here, there, grad)
            if step is None:
                continue
            moved = int(step.forward_bytes + step.backward_bytes)
            cost = (collectives + moved, length + 1)
            if there not in best or cost < best[there][0]:
                best[there] = (cost, (*chain, step))
                queue.append(there)
    return best[target][1]


def types_of(dims: int, blocked: Iterable[SpmdType] = ()) -> tuple[SpmdType, ...]:
    """Every legal type of a tensor of ``dims`` dims on one axis: R, I, P, S(d), and the blocked splits given."""
    kinds = [R, I, P, *(SpmdType("S", dim) for dim in range(dims)), *blocked]
    return tuple(dict.fromkeys(kinds))


def convertible(layout: Layout, axis: str) -> bool:
    """Whether ``axis`` may change its type: it splits no dim, or is the innermost axis on the one it splits."""
    kind = layout[axis]
    return kind.kind != "S" or layout.splits(kind.dim)[-1] == axis


def convert(layout: Layout, axis: str, target: SpmdType) -> Layout:
    """``layout`` after one step of ``axis`` to ``target``, which becomes the innermost split of its dim."""
    if not convertible(layout, axis):
        inner = layout.splits(layout[axis].dim)[-1]
        raise ValueError(f"axis {axis} of {layout} cannot convert before {inner}, which splits the same dim inside it")
    return layout.with_type(axis, target)


@lru_cache(maxsize=1 << 16)
def path(source: Layout, target: Layout, grad: bool = True) -> tuple[tuple[str, Step], ...]:
    """The shortest chain of single-axis steps between layouts over any number of axes: (axis, step) in order.

    Fewest collectives, then fewest steps; only the innermost axis of a dim converts, so outer splits change
    by way of the inner ones. Empty when the layouts are the same.
    """
    axes = tuple(dict.fromkeys(axis for axis, _ in (*source.types, *target.types)))
    start, goal = _key(source, axes, grad), _key(target, axes, grad)
    best: dict[object, tuple[tuple[int, int], Layout, tuple[tuple[str, Step], ...]]] = {start: ((0, 0), source, ())}
    queue: deque[object] = deque([start])
    while queue:
        (collectives, length), layout, chain = best[queue.popleft()]
        for axis, step in _neighbours(layout, axes, target, grad):
            after = layout.with_type(axis, step.target)
            key = _key(after, axes, grad)
            cost = (collectives + int(step.forward_bytes + step.backward_bytes), length + 1)
            if key not in best or cost < best[key][0]:
                best[key] = (cost, after, (*chain, (axis, step)))
                queue.append(key)
    return best[goal][2]


def _neighbours(layout: Layout, axes: tuple[str, ...], target: Layout, grad: bool) -> Iterator[tuple[str, Step]]:
    for axis in axes:
        if convertible(layout, axis):
            for kind in (target[axis], I, R, P):
                step = direct(layout[axis], kind, grad)
                if step is not None:
                    yield axis, step


def _key(layout: Layout, axes: tuple[str, ...], grad: bool) -> object:
    """Equal for layouts that hold a tensor alike: types per axis, and the order of the axes of each split dim."""
    kinds = tuple(plain(layout[axis], grad) for axis in axes)
    dims = sorted({kind.dim for kind in kinds if kind.kind == "S"})
    return kinds, tuple((dim, layout.splits(dim)) for dim in dims)


@lru_cache(maxsize=1 << 16)
def same(first: Layout, second: Layout, grad: bool = True) -> bool:
    """Whether two layouts hold a tensor alike (the listing order of axes on different dims means nothing)."""
    if first == second:
        return True
    axes = tuple(dict.fromkeys(axis for axis, _ in (*first.types, *second.types)))
    return _key(first, axes, grad) == _key(second, axes, grad)
