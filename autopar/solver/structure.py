"""What may be done with one block kind on model axes, and what is to be priced for it: a problem without seconds.

`kind_structure` finds it, `block_problem` prices it. What costs the same whatever the sizes (the same operator on equal
tensors split alike, the same step of equal tensors) has one place among the operations or moves of `KindStructures`.
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.graph.ir import Node
from autopar.sharding.layout import Layout
from autopar.solver.axis_choices import AxesChoice
from autopar.solver.prices import Action, Inside, Part
from autopar.solver.problem import Op, Output

Pair = tuple[Layout, Layout]

Act = tuple[int, Action]
"""What a conversion does one way to the part that is whole on its axis, by its place in `KindStructures`."""

Move = tuple[int, int]
"""A direct conversion: what it does forward, and backward, by their places in `KindStructures.acts`."""


@dataclass(frozen=True, slots=True)
class Operation:
    """``node`` on tensors that are split so. ``inputs``, ``output`` and the tensors of ``inside`` are places in
    `KindStructures.parts`; ``grads``: which inputs want a gradient."""

    node: Node
    inputs: tuple[int, ...]
    output: int
    grads: tuple[bool, ...]
    inside: tuple[tuple[Inside, int], ...]


@dataclass(frozen=True, slots=True)
class Way:
    """A choice without its price: ``operation`` is its place in `KindStructures.operations`, ``kept`` are those of the
    parts that it keeps for backward."""

    name: str
    inputs: tuple[Layout, ...]
    output: Layout
    operation: int
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ways:
    """An operator without its prices. ``again``: it runs again in backward. ``alike``: some ways have the same layouts.
    ``choices``: the strategies that its ways stand for."""

    name: str
    operands: tuple[str, ...]
    ways: tuple[Way, ...]
    choices: tuple[AxesChoice, ...]
    again: bool
    alike: bool


@dataclass(frozen=True, slots=True)
class Held:
    """A source: each layout it may arrive in, and the part that it holds then. ``share``: how much of the price of a
    parameter's element one of its own costs."""

    name: str
    layouts: dict[Layout, int]
    share: float
    tie: str


@dataclass(frozen=True, slots=True)
class Table:
    """Direct conversions of a tensor and the places of their steps in `KindStructures.moves`; twice if ``again``."""

    moves: dict[Pair, int]
    again: bool


@dataclass(frozen=True, slots=True)
class Structure:
    """One kind's part of the problem, without seconds and bytes.

    ``parts``, ``operations``, ``moves`` and their ``acts`` that it needs, by their places in `KindStructures`.
    ``conversions``: per tensor the place of its table in ``tables``.
    """

    parts: tuple[tuple[int, Part], ...]
    operations: tuple[tuple[int, Operation], ...]
    moves: tuple[tuple[int, Move], ...]
    acts: tuple[tuple[int, Act], ...]
    sources: tuple[Held, ...]
    ops: tuple[Ways | Op, ...]
    outputs: tuple[Output, ...]
    tables: tuple[Table, ...]
    conversions: dict[str, int]
    hubs: dict[str, frozenset[Layout]]
