"""The intra-block ILP: one strategy per operator, conversions shared and paid once, solved by CP-SAT.

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
left out. Costs become integers, rounded down by less than ``unit`` each, hence the optimum of the integers times
``unit`` is a valid bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Any

from ortools.sat.python import cp_model

from autopar.errors import AutoparError
from autopar.solver.linear import OPTIMAL, TOLERANCE, linear_program, solve_linear
from autopar.solver.problem import Answer, Layout, Problem, path, price, produced, shortest

RESOLUTION = 2**36
"""Integer steps into which the largest sensible objective is cut."""

Sum = tuple[int, ...]
"""A sum of variables, by their places."""


def solve(problem: Problem, byte_price: float = 0.0, work_limit: float = 30.0) -> Answer:
    """The cheapest answer by ``seconds + byte_price * bytes``.

    ``work_limit`` is CP-SAT's deterministic time. Deterministic: one worker, fixed seed, ties broken by the order of
    strategies. Raises AutoparError when no combination of layouts is possible or none was found within the limit.
    """
    model = _Model(problem, byte_price)
    solver = cp_model.CpSolver()
    solver.parameters.catch_sigint_signal = False  # Ctrl-C is Python's, as everywhere else
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = work_limit
    solver.parameters.linearization_level = 2
    solver.parameters.cp_model_probing_level = 0
    cp, variables = model.booleans()
    status = solver.solve(cp)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        names = ", ".join(op.name for op in problem.ops[:3])
        raise AutoparError(
            f"no sharding of the block ({names}, ...) found: CP-SAT says {solver.status_name(status)}; "
            "an operator's strategies cannot be reached from its neighbours' layouts"
        )
    answer = model.read([solver.boolean_value(variable) for variable in variables])
    seconds, size = price(problem, answer)
    bound = min(solver.best_objective_bound * model.unit + model.offset, seconds + byte_price * size)
    return Answer(
        answer.strategies,
        answer.sources,
        answer.outputs,
        answer.conversions,
        seconds,
        size,
        bound,
        "optimal" if status == cp_model.OPTIMAL else "feasible",
        {"booleans": float(solver.num_booleans), "solve_s": solver.wall_time, "variables": float(len(model.terms))},
    )


def relaxed_bound(problem: Problem) -> float:
    """A lower bound on the seconds of every answer, in a fraction of the time of `solve`: the linear relaxation, by
    GLOP."""
    model = _Model(problem, 0.0)
    scale = model.unit * RESOLUTION
    linear = model.linear([seconds / scale for seconds, _ in model.terms])
    solver, status = solve_linear(linear)
    if status != OPTIMAL:
        return model.offset
    return float(solver.objective_value) * scale * (1 - TOLERANCE) + model.offset


def _sum(expressions: Any, variables: Sequence[Any], plus: Sequence[int], minus: Sequence[int]) -> Any:
    places = [variables[place] for place in (*plus, *minus)]
    return expressions.weighted_sum(places, [1] * len(plus) + [-1] * len(minus))


@dataclass(slots=True)
class _Copies:
    """The conversions of one tensor: per depth, (from, to) to variable; transport has the single depth 1."""

    depths: list[dict[tuple[Layout, Layout], int]] = field(default_factory=list)


_NO_PATHS = shortest({})


class _Model:
    """Variables and constraints of a problem, for CP-SAT or GLOP, and how to read a solution.

    ``terms``: seconds and place among equals of every variable; ``rows``: low <= the sum of some variables minus that
    of others <= high. ``unit``, ``offset``: the objective is the seconds of the variables that are one and ``offset``,
    counted in units."""

    def __init__(self, problem: Problem, byte_price: float) -> None:
        self.problem = problem
        self.terms: list[tuple[float, int]] = []
        self.rows: list[tuple[Sum, Sum, int, int]] = []
        self.made = produced(problem)
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
        scale = self.offset + max((seconds for seconds, _ in self.terms), default=0.0)
        self.unit = max(scale, 1e-12) / RESOLUTION

    def booleans(self) -> tuple[cp_model.CpModel, list[Any]]:
        """The model for CP-SAT and its variables. Seconds are cut into units, which lowers ``offset``."""
        cp = cp_model.CpModel()
        variables = [cp.new_bool_var("") for _ in self.terms]
        for plus, minus, low, high in self.rows:
            if low == high == 1 and not minus:
                cp.add_exactly_one([variables[place] for place in plus])
            else:
                cp.add_linear_constraint(_sum(cp_model.LinearExpr, variables, plus, minus), low, high)
        # A tie step is far below any real difference; it only makes equal answers come out in one order.
        costs = [int(seconds / self.unit) + tie for seconds, tie in self.terms]
        cp.minimize(cp_model.LinearExpr.weighted_sum(variables, costs))
        most_ties = sum(len(op.choices) for op in self.problem.ops) + len(self.terms)
        self.offset -= self.unit * most_ties
        return cp, variables

    def linear(self, costs: Sequence[float]) -> Any:
        """The relaxation for GLOP, which minimises ``costs`` of the variables. Filled through the builder's helper: its
        expressions take longer to make than the model to solve."""
        linear = linear_program()
        helper = linear.helper
        places = helper.add_var_array([len(costs)], 0.0, 1.0, False, "")
        variables = [linear.var_from_index(place) for place in places.tolist()]
        for plus, minus, low, high in self.rows:
            row = helper.add_linear_constraint()
            helper.set_constraint_lower_bound(row, low)
            helper.set_constraint_upper_bound(row, high)
            terms = [variables[place] for place in (*plus, *minus)]
            helper.add_terms_to_constraint(row, terms, [1.0] * len(plus) + [-1.0] * len(minus))
        helper.set_objective_coefficients([*range(len(costs))], costs)
        return linear

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
