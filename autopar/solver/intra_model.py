"""The intra-block ILP: one strategy per operator, conversions shared and paid once, as sums of Booleans.

Variables (Booleans): ``x[o,k]`` operator o runs strategy k; ``y[t,l]`` source t arrives, or output t leaves, in layout
l; ``c[t,d,a,b]`` tensor t is converted from layout a to layout b as its copy of depth d; depth 0 is what the producer
makes. One problem holds all block kinds of a model, each weighted with its number of blocks: the layout between blocks
is one tie, the storage of a tied parameter another.

    (1) each operator runs one strategy:                     sum_k x[o,k] = 1                        `_choose`
    (2) each source and output has one layout, tied ones alike:  sum_l y[t,l] = 1, y[t,l] = y[u,l]   `_arrive`
    (3) depth 1 starts at the layout that is produced:       c[t,1,a,b] <= produced[t,a]             `_copies`
    (4) depth d starts at a copy of depth d-1:               c[t,d,a,b] <= sum_e c[t,d-1,e,a]        `_copies`
    (5) a layout that is read is there, for every reader:    sum_{k reads l} x[o,k]
                                                                 <= produced[t,l] + sum_d,a c[t,d,a,l]   `_reads`
    (6) one reader needs no sharing: the conversion is a transport from the produced to the read layout, which
        gives a tight relaxation:  sum_b c[t,a,b] = produced[t,a],  sum_a c[t,a,b] = read[t,b]       `_transport`

    minimise   sum x·(seconds + price·bytes) + sum y·(seconds + price·bytes) + sum c·seconds

Depth makes "two conversions justify each other" impossible: without it (copies that may start at any copy) a tensor
could appear in two layouts that nothing produced, each made from the other. Conversion seconds are closed under
composition first (`problem.shortest`), so no depth beyond the number of readers is ever needed: each inner vertex
of the cheapest tree is read, or branches towards another reader. A conversion that no depth-0 layout could beat is
left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

import numpy as np
from numpy.typing import NDArray

from autopar.solver.linear import Floats
from autopar.solver.problem import Answer, Layout, Problem, path, shortest

Sum = tuple[int, ...]
"""A sum of variables, by their places."""

Row = tuple[Sum, Sum, int, int]
"""low <= the sum of some variables minus that of others <= high."""

Places = NDArray[np.int64]


@dataclass(slots=True)
class _Copies:
    """The conversions of one tensor: per depth, (from, to) to variable; transport has the single depth 1."""

    depths: list[dict[tuple[Layout, Layout], int]] = field(default_factory=list)


_NO_PATHS = shortest({})


class BlockModel:
    """Variables and constraints of a problem, and how to read a solution.

    ``terms``: seconds and place among equals of every variable; ``rows``: low <= the sum of some variables minus that
    of others <= high. The objective is the seconds of the variables that are one and ``offset``; none has more than
    ``scale``."""

    def __init__(self, problem: Problem, byte_price: float) -> None:
        self.problem = problem
        self.terms: list[tuple[float, int]] = []
        self.rows: list[Row] = []
        tables = {id(direct): direct for direct in problem.conversions.values()}  # tensors alike share one
        ways = {each: shortest(direct) for each, direct in tables.items()}
        self.best = {tensor: ways[id(direct)] for tensor, direct in problem.conversions.items()}
        self.x: dict[str, Sum] = {}
        self.y: dict[str, dict[Layout, int]] = {}
        self.z: list[dict[Layout, int]] = []
        self.copies: dict[str, _Copies] = {}
        self.offset = 0.0
        self._choose(byte_price)
        self._arrive(byte_price)
        self._convert()
        self.scale = max(self.offset + max((seconds for seconds, _ in self.terms), default=0.0), 1e-12)

    def matrix(self) -> tuple[Places, Places, Floats]:
        """The rows: of each factor its row, its variable and itself."""
        sizes = [len(plus) + len(minus) for plus, minus, _, _ in self.rows]
        places = [place for plus, minus, _, _ in self.rows for place in (*plus, *minus)]
        signs = [sign for plus, minus, _, _ in self.rows for sign in [1.0] * len(plus) + [-1.0] * len(minus)]
        return np.repeat(np.arange(len(sizes)), sizes), np.array(places, dtype=np.int64), np.array(signs)

    def _bool(self, seconds: float, tie: int = 0) -> int:
        self.terms.append((seconds, tie))
        return len(self.terms) - 1

    def _one(self, places: Iterable[int]) -> None:
        self.rows.append((tuple(places), (), 1, 1))

    def _equal(self, plus: Sum, minus: Sum) -> None:
        self.rows.append((plus, minus, 0, 0))

    def _at_most(self, part: Sum, whole: Sum) -> None:
        self.rows.append((part, whole, -(2**31), 0))

    def _choose(self, byte_price: float) -> None:
        """Constraint (1)."""
        for op in self.problem.ops:
            weight = self.problem.weight(op.name)
            costs = [weight * (choice.seconds + byte_price * choice.bytes) for choice in op.choices]
            base = min(costs, default=0.0)
            self.offset += base
            self.x[op.name] = tuple(self._bool(cost - base, index) for index, cost in enumerate(costs))
            self._one(self.x[op.name])

    def _arrive(self, byte_price: float) -> None:
        """Constraint (2)."""
        ties: dict[str, dict[Layout, int]] = {}
        for source in self.problem.sources:
            weight = self.problem.weight(source.name)
            options = {
                layout: self._bool(weight * (seconds + byte_price * size), index)
                for index, (layout, (seconds, size)) in enumerate(source.layouts.items())
            }
            self._tie(options, source.tie, ties)
            self.y[source.name] = options
        for output in self.problem.outputs:
            options = {layout: self._bool(0.0, index) for index, layout in enumerate(output.layouts)}
            self._tie(options, output.tie, ties)
            self.z.append(options)

    def _tie(self, options: dict[Layout, int], tie: str, ties: dict[str, dict[Layout, int]]) -> None:
        self._one(options.values())
        first = ties.setdefault(tie, options) if tie else options
        if first is not options:
            for layout in dict.fromkeys((*first, *options)):
                here, there = (((way[layout],) if layout in way else ()) for way in (options, first))
                self._equal(here, there)

    def _made(self) -> dict[str, dict[Layout, Sum]]:
        """For each tensor and layout, the sum that says it is produced so."""
        made: dict[str, dict[Layout, Sum]] = {
            name: {layout: (place,) for layout, place in options.items()} for name, options in self.y.items()
        }
        for op in self.problem.ops:
            made[op.name] = _by_layout(((choice.output for choice in op.choices)), self.x[op.name])
        return made

    def _readers(self) -> dict[str, list[dict[Layout, Sum]]]:
        """For each tensor, its readers: layout to the sum that says it is read so; equal ones once."""
        readers: dict[str, list[dict[Layout, Sum]]] = {}
        for op in self.problem.ops:
            seen: set[tuple[str, tuple[Layout, ...]]] = set()
            for position, tensor in enumerate(op.operands):
                wanted = tuple(choice.inputs[position] for choice in op.choices)
                if (tensor, wanted) not in seen:
                    seen.add((tensor, wanted))
                    readers.setdefault(tensor, []).append(_by_layout(wanted, self.x[op.name]))
        for output, options in zip(self.problem.outputs, self.z, strict=True):
            readers.setdefault(output.tensor, []).append({layout: (place,) for layout, place in options.items()})
        return readers

    def _convert(self) -> None:
        made = self._made()
        for tensor, readers in self._readers().items():
            if len(readers) == 1:
                self.copies[tensor] = self._transport(tensor, made[tensor], readers[0])
            else:
                self.copies[tensor] = self._copies(tensor, made[tensor], readers)
                self._reads(self.copies[tensor], made[tensor], readers)

    def _transport(self, tensor: str, made: dict[Layout, Sum], reader: dict[Layout, Sum]) -> _Copies:
        """Constraint (6)."""
        weight = self.problem.weight(tensor)
        moves: dict[tuple[Layout, Layout], int] = {}
        leaving: dict[Layout, list[int]] = {a: [] for a in made}
        coming: dict[Layout, list[int]] = {b: [] for b in reader}
        table = self.best.get(tensor, _NO_PATHS).between(made, reader)
        equal = {b: column for column, b in enumerate(reader)}
        for (a, left), row in zip(leaving.items(), table, strict=True):
            stays = equal.get(a)
            for column, (b, came) in enumerate(coming.items()):
                seconds = row[column]
                if column == stays:
                    place = self._bool(0.0)
                elif seconds < inf:
                    place = moves[a, b] = self._bool(weight * seconds, 1)
                else:
                    continue
                left.append(place)
                came.append(place)
        for a, sources in made.items():
            self._equal(tuple(leaving[a]), sources)
        for b, wanted in reader.items():
            self._equal(tuple(coming[b]), wanted)
        return _Copies([moves])

    def _copies(self, tensor: str, made: dict[Layout, Sum], readers: list[dict[Layout, Sum]]) -> _Copies:
        """Constraints (3) and (4)."""
        best = self.best.get(tensor, _NO_PATHS)
        weight = self.problem.weight(tensor)
        targets = tuple(dict.fromkeys([b for reader in readers for b in reader]))
        hubs = self.problem.hubs.get(tensor)
        via = tuple(dict.fromkeys([*targets, *(b for b in best.ends() if hubs is None or b in hubs)]))
        table = best.between(made, via)
        straight = {b: [row[column] for row in table] for column, b in enumerate(via)}
        onward = dict(zip(via, best.between(via, via), strict=True))
        copies = _Copies()
        reached: dict[Layout, list[int]] = {}
        for depth in range(1, len(readers) + 1):
            level: dict[tuple[Layout, Layout], int] = {}
            last = depth == len(readers)
            for column, b in enumerate(targets if last else via):
                for row, a in enumerate(made if depth == 1 else reached):
                    seconds = straight[b][row] if depth == 1 else onward[a][column]
                    if a == b or seconds == inf or (depth > 1 and not _helps(made, straight[b], a, b, seconds)):
                        continue
                    level[a, b] = self._bool(weight * seconds, 1)
                    self._at_most((level[a, b],), made[a] if depth == 1 else tuple(reached[a]))
            copies.depths.append(level)
            reached = {}
            for (_, b), place in level.items():
                reached.setdefault(b, []).append(place)
        return copies

    def _reads(self, copies: _Copies, made: dict[Layout, Sum], readers: list[dict[Layout, Sum]]) -> None:
        """Constraint (5)."""
        there: dict[Layout, list[int]] = {}
        for level in copies.depths:
            for (_, b), place in level.items():
                there.setdefault(b, []).append(place)
        for reader in readers:
            for layout, wanted in reader.items():
                self._at_most(wanted, (*made.get(layout, ()), *there.get(layout, ())))

    def read(self, chosen: Sequence[bool]) -> Answer:
        """The solution, with conversions that are composed of several steps spelt out and none repeated."""
        strategies = {name: [chosen[place] for place in x].index(True) for name, x in self.x.items()}
        sources = {name: next(l for l, place in y.items() if chosen[place]) for name, y in self.y.items()}
        outputs = tuple(next(l for l, place in z.items() if chosen[place]) for z in self.z)
        start = dict(sources)
        for op in self.problem.ops:
            start[op.name] = op.choices[strategies[op.name]].output
        conversions: list[tuple[str, Layout, Layout]] = []
        for tensor, copies in self.copies.items():
            held = {start[tensor]}
            for level in copies.depths:
                for (a, b), place in level.items():
                    if not chosen[place] or b in held:
                        continue
                    for p, q in pairwise(path(self.best[tensor], a, b)):
                        if q not in held:
                            conversions.append((tensor, p, q))
                            held.add(q)
        return Answer(strategies, sources, outputs, tuple(conversions), 0.0, 0.0, 0.0)


def _helps(made: Iterable[Layout], straight: Sequence[float], a: Layout, b: Layout, seconds: float) -> bool:
    """Whether a copy b from copy a can be cheaper than straight from what is produced, for some product. ``straight``:
    seconds to b from each layout of ``made``; infinite where no path leads."""
    return any(seconds < each and p not in (a, b) for p, each in zip(made, straight, strict=True))


def _by_layout(layouts: Iterable[Layout], places: Sum) -> dict[Layout, Sum]:
    found: dict[Layout, list[int]] = {}
    for layout, place in zip(layouts, places, strict=True):
        found.setdefault(layout, []).append(place)
    return {layout: tuple(some) for layout, some in found.items()}
