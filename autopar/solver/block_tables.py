"""The problem of a block as tables for `elimination`: what each choice costs, and each tensor's conversions.

Variables are the strategies of operators, the layouts of sources and outputs (one for all of a tie), and of a tensor
with several readers the set of layouts that are made of it. Where two read it, its table is of what makes it and of
both readers; where more do, of what makes it and the set, and each reader finds what it reads in the set or not. A set
of which a larger one is as cheap, whatever makes the tensor, is left out: mostly few are left, and tables stay narrow.

The problem is the one `intra_model` writes as an ILP, and so is the least, for blocks as wide as those of today's
models in an eighth to half of the time (benchmarks/README.md). It is exact, where a relaxation is some percent low.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np

from autopar.solver import elimination
from autopar.solver.conversion_trees import Trees, useful
from autopar.solver.elimination import Order, Scope, order_of
from autopar.solver.linear import Floats
from autopar.solver.problem import Answer, Layout, Paths, Problem, path, shortest

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
class _Tensor:
    """What makes a tensor, and its readers: of each the variable, and the layout for each of its values."""

    maker: int
    made: Sequence[Layout]
    readers: list[tuple[int, Sequence[Layout]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Ways:
    """How a tensor is converted: cheapest ``paths``, and ``trees`` of them between layouts by their ``place``."""

    paths: Paths
    trees: Trees
    place: dict[Layout, int]

    def places(self, layouts: Iterable[Layout]) -> list[int]:
        return [self.place[layout] for layout in layouts]


class TooWideError(Exception):
    """Tables of this problem would have too many entries."""


class BlockTables:
    """Tables of a problem, and how to read what is best. ``tie``: seconds of one place among equals; zero where only
    the least is of interest. Raises TooWideError."""

    def __init__(self, problem: Problem, byte_price: float = 0.0, ties: bool = False) -> None:
        self.problem, self.byte_price = problem, byte_price
        self.sizes: list[int] = []
        self.scopes: list[Scope] = []
        self.tables: list[Floats] = []
        self.tensors: dict[str, _Tensor] = {}
        self.ways: dict[str, _Ways] = {}
        self.outputs: list[tuple[int, Sequence[Layout]]] = []
        self.tied: dict[str, tuple[int, Sequence[Layout]]] = {}
        self.free: dict[str, Floats] = {}
        fastest = sum(
            [problem.weight(op.name) * min([each.seconds for each in op.choices], default=0.0) for op in problem.ops]
        )
        self.tie = (fastest or 1.0) / STEPS if ties else 0.0
        self.most_ties = sum([len(op.choices) for op in problem.ops]) + 2 * (len(problem.ops) + len(problem.sources))
        self._ties()
        self._sources()
        self._operators()
        self._leaving()
        self._convert()

    def least(self, operators: Sequence[str] = ()) -> Floats:
        """The least ``seconds + byte_price * bytes`` of all answers, infinite where there is none: [strategy of each of
        some operators]. Raises TooWideError."""
        kept = tuple(self.tensors[name].maker for name in operators)
        if 0 in self.sizes:
            return np.full([self.sizes[variable] for variable in kept], inf)
        return elimination.least(self._order(kept), self.tables)

    def best(self) -> Answer | None:
        """The best answer, its sums left open; None if none is possible. Raises TooWideError."""
        if 0 in self.sizes:
            return None
        value, values = elimination.best(self._order(), self.tables)
        return None if value == inf else self._read(values)

    def _order(self, kept: Scope = ()) -> Order:
        order = order_of(tuple(self.sizes), tuple(self.scopes), kept)
        if order.entries > WIDE:
            raise TooWideError
        return order

    def _variable(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def _add(self, scope: Sequence[int], table: Any) -> None:
        """A table whose axes are of these variables, in any order and repeated where they are. One that has one value
        only is no variable."""
        if any(self.sizes[variable] == 1 for variable in scope):
            table = table.reshape([self.sizes[variable] for variable in scope if self.sizes[variable] > 1])
            scope = [variable for variable in scope if self.sizes[variable] > 1]
        ordered = sorted(set(scope))
        if list(scope) != ordered:
            places = [ordered.index(variable) for variable in scope]
            table = np.einsum(table, places, list(range(len(ordered))))
        self.scopes.append(tuple(ordered))
        self.tables.append(table)

    def _costs(self, name: str, pairs: Sequence[tuple[float, float]]) -> Floats:
        """Seconds of (seconds, bytes), in the order of preference."""
        weight = self.problem.weight(name)
        return np.array(
            [weight * (s + self.byte_price * size) + place * self.tie for place, (s, size) in enumerate(pairs)]
        )

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
        for variable, layouts in self.tied.values():
            self._add((variable,), np.zeros(len(layouts)))

    def _held(self, tie: str, layouts: Sequence[Layout]) -> tuple[int, Sequence[Layout]]:
        """The variable of a source or output, and the layout for each of its values."""
        return self.tied[tie] if tie else (self._variable(len(layouts)), layouts)

    def _sources(self) -> None:
        problem = self.problem
        reads = Counter(name for op in problem.ops for name in op.operands)
        reads.update(output.tensor for output in problem.outputs)
        for source in problem.sources:
            if not source.tie and reads[source.name] > 2:
                self.free[source.name] = self._costs(source.name, list(source.layouts.values()))
                self.tensors[source.name] = _Tensor(FREE, list(source.layouts))
                continue
            variable, layouts = self._held(source.tie, list(source.layouts))
            self._add((variable,), self._costs(source.name, [source.layouts[layout] for layout in layouts]))
            self.tensors[source.name] = _Tensor(variable, layouts)

    def _operators(self) -> None:
        for op in self.problem.ops:
            variable = self._variable(len(op.choices))
            self._add((variable,), self._costs(op.name, [(each.seconds, each.bytes) for each in op.choices]))
            for position, tensor in enumerate(op.operands):
                reader = variable, [choice.inputs[position] for choice in op.choices]
                if reader not in self.tensors[tensor].readers:
                    self.tensors[tensor].readers.append(reader)
            self.tensors[op.name] = _Tensor(variable, [choice.output for choice in op.choices])

    def _leaving(self) -> None:
        for output in self.problem.outputs:
            variable, layouts = self._held(output.tie, output.layouts)
            if not output.tie:
                self._add((variable,), self.tie * np.arange(len(layouts)))
            self.outputs.append((variable, layouts))
            self.tensors[output.tensor].readers.append((variable, layouts))

    def _convert(self) -> None:
        alike: dict[int, tuple[Paths, Floats]] = {}  # tensors alike share one table of conversions
        for name, tensor in self.tensors.items():
            if not tensor.readers:
                continue
            direct = self.problem.conversions.get(name, {})
            if id(direct) not in alike:
                paths = shortest(direct)
                alike[id(direct)] = paths, np.array(paths.seconds).reshape((len(paths.place),) * 2)
            ways = self.ways[name] = self._ways_of(name, tensor, *alike[id(direct)])
            if len(tensor.readers) > 2 or name in self.free:
                self._sets(name, tensor, ways)
                continue
            variables = [tensor.maker, *(variable for variable, _ in tensor.readers)]
            places = [ways.places(layouts) for layouts in (tensor.made, *(wanted for _, wanted in tensor.readers))]
            if len(places) == 2:
                self._add(variables, ways.trees.one(*places))
            else:
                once = [list(dict.fromkeys(some)) for some in places]
                rows = [[some.index(place) for place in every] for some, every in zip(once, places, strict=True)]
                self._add(variables, ways.trees.two(*once)[np.ix_(*rows)])

    def _ways_of(self, name: str, tensor: _Tensor, paths: Paths, seconds: Floats) -> _Ways:
        ends = dict.fromkeys([*tensor.made, *(layout for _, wanted in tensor.readers for layout in wanted)])
        known, place = len(paths.place), dict(paths.place)
        for layout in ends:
            place.setdefault(layout, len(place))
        table = np.full((len(place), len(place)), inf)
        table[:known, :known] = self.problem.weight(name) * seconds + self.tie
        np.fill_diagonal(table, 0.0)
        hubs = self.problem.hubs.get(name)
        via = [index for layout, index in place.items() if hubs is None or layout in hubs or layout in ends]
        return _Ways(paths, Trees(table, via), place)

    def _sets(self, name: str, tensor: _Tensor, ways: _Ways) -> None:
        """Tables of a tensor that many read."""
        wanted = list(dict.fromkeys([layout for _, layouts in tensor.readers for layout in layouts]))
        if len(wanted) > MOST_LAYOUTS:
            raise TooWideError
        made = list(dict.fromkeys(tensor.made))
        sets, seconds = ways.trees.sets(ways.places(made), ways.places(wanted), len(tensor.readers))
        if name in self.free:
            seconds = (self.free[name][:, None] + seconds).min(0, keepdims=True)
        kept = useful(sets, seconds)
        variable = self._variable(len(kept))
        if name in self.free:
            self._add((variable,), seconds[0, kept])
        else:
            rows = [made.index(layout) for layout in tensor.made]
            self._add((tensor.maker, variable), seconds[np.ix_(rows, kept)])
        bits = np.array(sets)[kept]
        for reader, layouts in tensor.readers:
            places = np.array([wanted.index(layout) for layout in layouts])
            self._add((reader, variable), np.where(bits[None, :] >> places[:, None] & 1, 0.0, inf))

    def _read(self, values: Sequence[int]) -> Answer:
        held: dict[str, Layout] = {}
        conversions: list[tuple[str, Layout, Layout]] = []
        for name, tensor in self.tensors.items():
            wanted = [layouts[values[variable]] for variable, layouts in tensor.readers]
            start = self._cheapest(name, wanted) if name in self.free else values[tensor.maker]
            held[name] = tensor.made[start]
            if wanted:
                conversions += self._conversions(name, held[name], wanted)
        sources = {source.name: held[source.name] for source in self.problem.sources}
        strategies = {op.name: values[self.tensors[op.name].maker] for op in self.problem.ops}
        outputs = tuple(layouts[values[variable]] for variable, layouts in self.outputs)
        return Answer(strategies, sources, outputs, tuple(conversions), 0.0, 0.0, 0.0)

    def _cheapest(self, name: str, wanted: Sequence[Layout]) -> int:
        """The place of the layout in which a free source arrives."""
        ways, made = self.ways[name], self.tensors[name].made
        goals = list(dict.fromkeys(ways.places(wanted)))
        sets, seconds = ways.trees.sets(ways.places(made), goals, len(goals))
        return int((self.free[name] + seconds[:, sets.index((1 << len(goals)) - 1)]).argmin())

    def _conversions(self, name: str, start: Layout, wanted: Sequence[Layout]) -> list[tuple[str, Layout, Layout]]:
        """Those of the cheapest tree, composed ones spelt out and none repeated."""
        ways = self.ways[name]
        layouts, there, found = list(ways.place), {start}, []
        for a, b in ways.trees.edges(ways.place[start], ways.places(wanted)):
            for p, q in pairwise(path(ways.paths, layouts[a], layouts[b])):
                if q not in there:
                    found.append((name, p, q))
                    there.add(q)
        return found
