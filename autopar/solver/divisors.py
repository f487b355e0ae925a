"""What the sizes of axes and batch mean for how a block kind may be split: which sizes divide by which, and no more.

Choices, layouts and conversions of a kind follow from the names of the axes and from answers to a few questions: does
a dim, a factor or what is left of one between blocks divide by the ranks of some axes; does each rank get a part of it;
how do blocks lie within each other. Equal answers mean equal structures (`kind_structure`), whatever the sizes; most
micro-batches and many sizes of an axis give the same ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations, permutations
from math import prod

from autopar.graph.ir import Node, OpGraph
from autopar.graph.size import BATCH, Size, divide, size_at
from autopar.sharding.layout import SpmdType
from autopar.sharding.local import least_part
from autopar.sharding.rules import strategies_of

Blocks = tuple[int | Size, ...]
"""Counts of blocks within which dims are split."""


class Answers:
    """The answers for ``batch`` samples of ``seq`` positions on some axes. ``names``: of the axes; ``sizes``: for each
    of a kind's sizes (by its place), which ranks divide it."""

    def __init__(self, axes: Mapping[str, int], batch: int, seq: int, sizes: tuple[tuple[bool, ...], ...]) -> None:
        self.names, self.sizes = tuple(axes), sizes
        self._ranks, self._batch, self._seq = tuple(axes.values()), batch, seq
        self._nested: dict[Blocks, tuple[bool, ...]] = {}

    def of(self, places: Iterable[int], blocks: Blocks) -> Hashable:
        """Those about some sizes, and about dims split within so many blocks."""
        return self.names, self.nested(blocks), tuple([self.sizes[place] for place in places])

    def nested(self, blocks: Blocks) -> tuple[bool, ...]:
        """How blocks of several axes lie within each other."""
        if len(self._ranks) < 2 or blocks in ((), (1,)):  # a single axis cuts no blocks of another
            return ()
        found = self._nested.get(blocks)
        if found is None:
            counts = [size_at(count, self._batch, self._seq) for count in blocks]
            ways = _products(self._ranks)
            whole = [test for each in counts for count in ways for test in (each % count == 0, each == count)]
            found = (*whole, *(first < second for first, second in permutations(counts, 2)))
            self._nested[blocks] = found
        return found


class Divisors:
    """The sizes by which a graph's tensors may be split, and the answers to all that is asked of them."""

    def __init__(self, graph: OpGraph) -> None:
        self._graph = graph
        self._place: dict[int | Size, int] = {}
        self._of_shape: dict[tuple[tuple[int | Size, ...], Blocks], tuple[int, ...]] = {}
        self._fixed: dict[tuple[int, ...], dict[int, tuple[bool, ...]]] = {}
        self._answers: dict[tuple[tuple[tuple[str, int], ...], int, int], Answers] = {}
        self._of_node = {node.name: self._of_op(node) for node in graph.of("op")}
        met = [count for _, blocks in self._of_node.values() for count in blocks]
        self.blocks: Blocks = tuple(dict.fromkeys([1, BATCH, *met]))
        for node in graph.nodes.values():
            self.of_shape(node.meta.shape, self.blocks)

    def of_shape(self, shape: tuple[int | Size, ...], blocks: Blocks) -> tuple[int, ...]:
        """The places of the sizes that decide in which layouts a tensor of this shape fits, split within so many
        blocks."""
        found = self._of_shape.get((shape, blocks))
        if found is None:
            parts = [divide(size, count) for size in shape for count in blocks if size]
            # Parameters are counted for one sample of one position.
            sizes = [*shape, *(part for part in parts if part is not None), *(size_at(size, 1, 1) for size in shape)]
            found = self._of_shape[shape, blocks] = self._places(sizes)
        return found

    def of_node(self, node: Node) -> tuple[tuple[int, ...], Blocks]:
        """The places of the sizes, and the counts of blocks, that decide what an op node may do."""
        return self._of_node[node.name]

    def answers(self, axes: Mapping[str, int], batch: int, seq: int) -> Answers:
        """For ``batch`` samples of ``seq`` positions on axes of these sizes."""
        key = (tuple(axes.items()), batch, seq)
        found = self._answers.get(key)
        if found is None:
            found = self._answers[key] = self._find_answers(axes, batch, seq)
        return found

    def _find_answers(self, axes: Mapping[str, int], batch: int, seq: int) -> Answers:
        ranks = tuple(axes.values())
        known = self._fixed.setdefault(ranks, {})
        ways = _products(ranks)
        found = []
        for size, place in self._place.items():
            if isinstance(size, Size):
                value = size.at(batch, seq)
                found.append(tuple([value % count == 0 for count in ways]))
            else:
                if place not in known:
                    known[place] = _fixed(size, ranks, ways)
                found.append(known[place])
        return Answers(axes, batch, seq, tuple(found))

    def _of_op(self, node: Node) -> tuple[tuple[int, ...], Blocks]:
        strategies = strategies_of(node, self._graph)
        blocks = blocks_of(kind for s in strategies for kind in (*s.inputs, s.output))
        extents = [s.extent for s in strategies if s.extent is not None]
        extents += [size_at(extent, 1, 1) for extent in extents]
        shapes = [self._graph.nodes[name].meta.shape for name in (*node.operands(), node.name)]
        places = [*self._places(extents), *(place for shape in shapes for place in self.of_shape(shape, blocks))]
        return tuple(dict.fromkeys(places)), blocks

    def _places(self, sizes: Iterable[int | Size]) -> tuple[int, ...]:
        return tuple(dict.fromkeys([self._place.setdefault(size, len(self._place)) for size in sizes]))


def blocks_of(kinds: Iterable[SpmdType]) -> Blocks:
    """The counts of blocks within which types split, and 1: splits within blocks may become whole ones."""
    return tuple(dict.fromkeys([1, *(kind.blocks for kind in kinds if kind.kind == "S")]))


def _fixed(size: int, ranks: Sequence[int], ways: Sequence[int]) -> tuple[bool, ...]:
    """Whether a size divides by each product of axes; and whether each rank gets a part, in each order of axes."""
    orders = [order for count in range(1, len(ranks) + 1) for order in permutations(ranks, count)]
    return (*(size % count == 0 for count in ways), *(least_part(size, order) >= 1 for order in orders))


def _products(ranks: Sequence[int]) -> list[int]:
    """The ranks of each set of axes together."""
    return [prod(some) for count in range(1, len(ranks) + 1) for some in combinations(ranks, count)]
