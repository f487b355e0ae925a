"""The problem of a block as tables for `elimination`: what each choice costs, and each tensor's conversions.

Variables are the strategies of operators, the layouts of sources and outputs (one for all of a tie), and of a tensor
with several readers the set of layouts that are made of it. Where two read it, its table is of what makes it and of
both readers; where more do, of what makes it and the set, and each reader finds what it reads in the set or not. A set
of which a larger one is as cheap, whatever makes the tensor, is left out: mostly few are left, and tables stay narrow.

What does not depend on seconds is found once (`BlockTables`), and filled with any seconds (`Costs`): shardings that
divide alike differ in those only.

The problem is the one `intra_model` writes as an ILP, and so is the least, for blocks as wide as those of today's
models in an eighth to half of the time (benchmarks/README.md). It is exact, where a relaxation is some percent low.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np

from autopar.solver import elimination
from autopar.solver.conversion_trees import Trees, useful
from autopar.solver.elimination import Order, Scope, order_of
from autopar.solver.linear import Floats
from autopar.solver.problem import Answer, Layout, Paths, Problem, layouts_of, path, shortest

MOST_LAYOUTS = 8
"""Layouts that three readers or more may want of one tensor: there are two to the power of so many sets."""

WIDE = 50_000_000
"""Entries of all sums of an elimination, from which on the ILP is likely to be faster: some tenths of a second."""

STEPS = 2.0**44
"""Into how many steps the fastest strategies' seconds are cut; equal answers come out in an order by such steps."""


FREE = -1
"""In place of the variable of a source that many read and nothing ties: it arrives as is the cheapest for the set of
layouts that is made of it."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a problem's choices, in its order: per source of each layout, per operator of each strategy.
    ``closed``: per table of ``BlockTables.direct`` those of the cheapest conversions, [from, to] as `layouts_of` has
    them, counted once. ``tie``: of one place among equals."""

    sources: Sequence[Floats]
    ops: Sequence[Floats]
    closed: Sequence[Floats]
    tie: float = 0.0


@dataclass(slots=True)
class _Tensor:
    """What makes a tensor, and its readers: of each the variable, and the layout for each of its values."""

    maker: int
    made: Sequence[Layout]
    readers: list[tuple[int, Sequence[Layout]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Ways:
    """How a tensor is converted. ``direct``: the place of its table of conversions; ``place``: of each layout, those
    that no conversion knows after the others; ``via``: where ways to several readers may part.

    Of what makes it, and of its readers: the variables (``axes``), the places of layouts that any of their values
    stands for (``once``), and for each value which of these (``rows``; ``grid``: as one index). Of many readers
    ``chosen`` is the variable of the set of layouts that is made, in which they find theirs, and ``once`` of them is
    what any wants.
    """

    direct: int
    place: dict[Layout, int]
    via: list[int]
    axes: list[int]
    once: list[list[int]]
    rows: list[list[int]]
    grid: tuple[Any, ...]
    chosen: int | None


@dataclass(frozen=True, slots=True)
class _Axes:
    """How a table's axes become those of its scope: which are ``kept``, as the others have one value, and ``places``
    of these among the variables of the scope, if they are not in its order."""

    kept: tuple[bool, ...]
    places: tuple[int, ...] | None
    scope: Scope

    def of(self, table: Any) -> Floats:
        if not all(self.kept):
            table = table.reshape([size for size, kept in zip(table.shape, self.kept, strict=True) if kept])
        if self.places is not None:
            table = np.einsum(table, list(self.places), list(range(len(self.scope))))
        found: Floats = table
        return found


@dataclass(frozen=True, slots=True)
class _Filled:
    """The ``tables`` in the order of their scopes, and the sizes of all variables."""

    sizes: tuple[int, ...]
    tables: list[Floats]


class TooWideError(Exception):
    """Tables of this problem would have too many entries."""


class BlockTables:
    """Tables of a problem, whatever its seconds, and how to read what is best. Raises TooWideError."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.sizes: list[int] = []
        self.axes: list[_Axes] = []
        self.tensors: dict[str, _Tensor] = {}
        self.ways: dict[str, _Ways] = {}
        self.outputs: list[tuple[int, Sequence[Layout]]] = []
        self.tied: dict[str, tuple[int, Sequence[Layout]]] = {}
        self.arrives: dict[str, list[int]] = {}
        self.direct: list[Mapping[tuple[Layout, Layout], float]] = []
        self.paths: dict[int, Paths] = {}
        self.most_ties = sum([len(op.choices) for op in problem.ops]) + 2 * (len(problem.ops) + len(problem.sources))
        self._ties()
        self._sources()
        self._operators()
        self._leaving()
        self._conversions()
        self.scopes = tuple(axes.scope for axes in self.axes)

    def least(self, costs: Costs, operators: Sequence[str] = ()) -> Floats:
        """The least sum of all answers, infinite where there is none: [strategy of each of some operators]. Raises
        TooWideError."""
        kept = tuple(self.tensors[name].maker for name in operators)
        if 0 in self.sizes:
            return np.full([self.sizes[variable] for variable in kept], inf)
        filled = self._fill(costs)
        return elimination.least(self._order(filled, kept), filled.tables)

    def best(self, costs: Costs) -> Answer | None:
        """The best answer, its sums left open; None if none is possible. Raises TooWideError."""
        if 0 in self.sizes:
            return None
        filled = self._fill(costs)
        value, values = elimination.best(self._order(filled), filled.tables)
        return None if value == inf else self._read(values, costs)

    def _order(self, filled: _Filled, kept: Scope = ()) -> Order:
        order = order_of(filled.sizes, self.scopes, kept)
        if order.entries > WIDE:
            raise TooWideError
        return order

    def _variable(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def _table(self, variables: Sequence[int]) -> None:
        """One more table, whose axes are of these variables, in any order and repeated where they are. One that has one
        value only is no variable."""
        kept = tuple(self.sizes[variable] > 1 for variable in variables)
        many = [variable for variable, each in zip(variables, kept, strict=True) if each]
        scope = sorted(set(many))
        places = None if many == scope else tuple(scope.index(variable) for variable in many)
        self.axes.append(_Axes(kept, places, tuple(scope)))

    def _ties(self) -> None:
        """One variable for all that are tied, of the layouts that all may have."""
        tied: dict[str, Sequence[Layout]] = {}
        for tie, alike in [
            *((source.tie, tuple(source.layouts)) for source in self.problem.sources),
            *((output.tie, output.layouts) for output in self.problem.outputs),
        ]:
            if tie:
                tied[tie] = [layout for layout in tied.get(tie, alike) if layout in alike]
        for tie, layouts in tied.items():
            self.tied[tie] = self._variable(len(layouts)), layouts
            self._table((self.tied[tie][0],))

    def _held(self, tie: str, layouts: Sequence[Layout]) -> tuple[int, Sequence[Layout]]:
        """The variable of a source or output, and the layout for each of its values."""
        return self.tied[tie] if tie else (self._variable(len(layouts)), layouts)

    def _sources(self) -> None:
        problem = self.problem
        reads = Counter(name for op in problem.ops for name in op.operands)
        reads.update(output.tensor for output in problem.outputs)
        for source in problem.sources:
            if not source.tie and reads[source.name] > 2:
                self.tensors[source.name] = _Tensor(FREE, list(source.layouts))
                continue
            variable, layouts = self._held(source.tie, list(source.layouts))
            self._table((variable,))
            self.arrives[source.name] = [list(source.layouts).index(layout) for layout in layouts]
            self.tensors[source.name] = _Tensor(variable, layouts)

    def _operators(self) -> None:
        for op in self.problem.ops:
            variable = self._variable(len(op.choices))
            self._table((variable,))
            for position, tensor in enumerate(op.operands):
                reader = variable, [choice.inputs[position] for choice in op.choices]
                if reader not in self.tensors[tensor].readers:
                    self.tensors[tensor].readers.append(reader)
            self.tensors[op.name] = _Tensor(variable, [choice.output for choice in op.choices])

    def _leaving(self) -> None:
        for output in self.problem.outputs:
            variable, layouts = self._held(output.tie, output.layouts)
            if not output.tie:
                self._table((variable,))
            self.outputs.append((variable, layouts))
            self.tensors[output.tensor].readers.append((variable, layouts))

    def _conversions(self) -> None:
        alike: dict[int, int] = {}  # tensors alike share one table of conversions
        for name, tensor in self.tensors.items():
            if not tensor.readers:
                continue
            direct = self.problem.conversions.get(name, {})
            if id(direct) not in alike:
                alike[id(direct)] = len(self.direct)
                self.direct.append(direct)
            ways = self.ways[name] = self._ways_of(name, tensor, alike[id(direct)])
            if ways.chosen is None:
                self._table(ways.axes)
                continue
            self._table((*ways.axes[: tensor.maker != FREE], ways.chosen))
            for reader in ways.axes[1:]:
                self._table((reader, ways.chosen))

    def _ways_of(self, name: str, tensor: _Tensor, direct: int) -> _Ways:
        place = {layout: index for index, layout in enumerate(layouts_of(self.direct[direct]))}
        held = [tensor.made, *(wanted for _, wanted in tensor.readers)]
        ends = dict.fromkeys([layout for some in held for layout in some])
        for layout in ends:
            place.setdefault(layout, len(place))
        hubs = self.problem.hubs.get(name)
        via = [index for layout, index in place.items() if hubs is None or layout in hubs or layout in ends]
        axes, chosen = [tensor.maker, *(variable for variable, _ in tensor.readers)], None
        once = [[place[layout] for layout in dict.fromkeys(some)] for some in held]
        if len(tensor.readers) > 2 or tensor.maker == FREE:
            wanted = list(dict.fromkeys([index for some in once[1:] for index in some]))
            if len(wanted) > MOST_LAYOUTS:
                raise TooWideError
            once[1:] = [wanted] * len(tensor.readers)
            chosen = self._variable(1 << len(wanted))
        rows = [[some.index(place[layout]) for layout in every] for some, every in zip(once, held, strict=True)]
        grid = np.ix_(*rows) if chosen is None else ()
        return _Ways(direct, place, via, axes, once, rows, grid, chosen)

    def costs(self, byte_price: float = 0.0, ties: bool = False) -> Costs:
        """What the problem itself says: ``seconds + byte_price * bytes``. ``ties``: equals are to come out in the order
        of preference."""
        problem = self.problem
        each = [problem.weight(op.name) * min([way.seconds for way in op.choices], default=0.0) for op in problem.ops]
        tie = (sum(each) or 1.0) / STEPS if ties else 0.0

        def seconds(name: str, pairs: Iterable[tuple[float, float]]) -> Floats:
            weight = problem.weight(name)
            return np.array([weight * (s + byte_price * size) + place * tie for place, (s, size) in enumerate(pairs)])

        return Costs(
            [seconds(source.name, source.layouts.values()) for source in problem.sources],
            [seconds(op.name, [(way.seconds, way.bytes) for way in op.choices]) for op in problem.ops],
            [np.array(self._paths(place).seconds) for place in range(len(self.direct))],
            tie,
        )

    def _paths(self, direct: int) -> Paths:
        """The cheapest conversions by the problem itself."""
        if direct not in self.paths:
            self.paths[direct] = shortest(self.direct[direct])
        return self.paths[direct]

    def _fill(self, costs: Costs) -> _Filled:
        """The tables with these seconds, in the order in which `_table` was told of them."""
        sizes = [*self.sizes]
        tables: list[Floats] = [np.zeros(len(layouts)) for _, layouts in self.tied.values()]
        held = dict(zip([source.name for source in self.problem.sources], costs.sources, strict=True))
        for name, arrives in self.arrives.items():
            tables.append(held[name][arrives])
        tables += costs.ops
        tables += [costs.tie * np.arange(len(o.layouts), dtype=float) for o in self.problem.outputs if not o.tie]
        for name, ways in self.ways.items():
            trees = self._trees(name, costs)
            if ways.chosen is not None:
                sets = self._sets(name, ways, trees, held)
                sizes[ways.chosen] = sets[0].shape[-1]
                tables += sets
            else:
                made = trees.one(*ways.once) if len(ways.axes) == 2 else trees.two(*ways.once)
                tables.append(made[ways.grid])
        return _Filled(tuple(sizes), [axes.of(table) for axes, table in zip(self.axes, tables, strict=True)])

    def _trees(self, name: str, costs: Costs) -> Trees:
        ways, weight = self.ways[name], self.problem.weight(name)
        closed, every = costs.closed[ways.direct], len(ways.place)
        if len(closed) < every or weight != 1.0 or costs.tie:
            table = np.full((every, every), inf)
            if len(closed):
                table[: len(closed), : len(closed)] = weight * closed + costs.tie
            np.fill_diagonal(table, 0.0)
            closed = table
        return Trees(closed, ways.via)

    def _sets(self, name: str, ways: _Ways, trees: Trees, held: Mapping[str, Floats]) -> list[Floats]:
        """Tables of a tensor that many read: what makes it (if that is a variable) and the set, each reader and it."""
        made, wanted = ways.once[:2]
        sets, seconds = trees.sets(made, wanted, len(ways.axes) - 1)
        if ways.axes[0] == FREE:
            seconds = (held[name][:, None] + seconds).min(0, keepdims=True)
        kept = useful(sets, seconds)
        first = seconds[0, kept] if ways.axes[0] == FREE else seconds[np.ix_(ways.rows[0], kept)]
        bits = np.array(sets)[kept]
        return [first, *(np.where(bits[None, :] >> np.array(rows)[:, None] & 1, 0.0, inf) for rows in ways.rows[1:])]

    def _read(self, values: Sequence[int], costs: Costs) -> Answer:
        sources = dict(zip([source.name for source in self.problem.sources], costs.sources, strict=True))
        held: dict[str, Layout] = {}
        conversions: list[tuple[str, Layout, Layout]] = []
        for name, tensor in self.tensors.items():
            wanted = [layouts[values[variable]] for variable, layouts in tensor.readers]
            if tensor.maker == FREE:
                held[name] = tensor.made[self._cheapest(name, wanted, sources[name], costs)]
            else:
                held[name] = tensor.made[values[tensor.maker]]
            if wanted:
                conversions += self._made_of(name, held[name], wanted, costs)
        strategies = {op.name: values[self.tensors[op.name].maker] for op in self.problem.ops}
        outputs = tuple(layouts[values[variable]] for variable, layouts in self.outputs)
        arrived = {source: held[source] for source in sources}
        return Answer(strategies, arrived, outputs, tuple(conversions), 0.0, 0.0, 0.0)

    def _cheapest(self, name: str, wanted: Sequence[Layout], arrives: Floats, costs: Costs) -> int:
        """The place of the layout in which a free source arrives."""
        ways = self.ways[name]
        goals = list(dict.fromkeys([ways.place[layout] for layout in wanted]))
        sets, seconds = self._trees(name, costs).sets(ways.once[0], goals, len(goals))
        return int((arrives + seconds[:, sets.index((1 << len(goals)) - 1)]).argmin())

    def _made_of(
        self, name: str, start: Layout, wanted: Sequence[Layout], costs: Costs
    ) -> list[tuple[str, Layout, Layout]]:
        """The conversions of the cheapest tree, composed ones spelt out and none repeated."""
        ways = self.ways[name]
        layouts, there, found = list(ways.place), {start}, []
        goals = [ways.place[layout] for layout in wanted]
        for a, b in self._trees(name, costs).edges(ways.place[start], goals):
            for p, q in pairwise(path(self._paths(ways.direct), layouts[a], layouts[b])):
                if q not in there:
                    found.append((name, p, q))
                    there.add(q)
        return found
