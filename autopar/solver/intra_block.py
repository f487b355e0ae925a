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

from dataclasses import dataclass, field
from typing import Any

from ortools.sat.python import cp_model

from autopar.errors import AutoparError
from autopar.solver.problem import Answer, Layout, Problem, path, price, produced, shortest

RESOLUTION = 2**36
"""Integer steps into which the largest sensible objective is cut."""


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
    status = solver.solve(model.cp)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        names = ", ".join(op.name for op in problem.ops[:3])
        raise AutoparError(
            f"no sharding of the block ({names}, ...) found: CP-SAT says {solver.status_name(status)}; "
            "an operator's strategies cannot be reached from its neighbours' layouts"
        )
    answer = model.read(solver)
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
        {"booleans": float(solver.num_booleans), "solve_s": solver.wall_time, "variables": float(model.variables)},
    )


@dataclass(slots=True)
class _Copies:
    """The conversions of one tensor: per depth, (from, to) to variable; transport has the single depth 1."""

    depths: list[dict[tuple[Layout, Layout], Any]] = field(default_factory=list)


class _Model:
    """The CP-SAT model of a problem, and how to read its solution."""

    def __init__(self, problem: Problem, byte_price: float) -> None:
        self.problem = problem
        self.cp = cp_model.CpModel()
        self.variables = 0
        self.terms: list[tuple[Any, float, int]] = []
        self.made = produced(problem)
        ways = {id(direct): shortest(direct) for direct in problem.conversions.values()}
        self.best = {tensor: ways[id(direct)] for tensor, direct in problem.conversions.items()}
        self.x: dict[str, list[Any]] = {}
        self.y: dict[str, dict[Layout, Any]] = {}
        self.z: list[dict[Layout, Any]] = []
        self.copies: dict[str, _Copies] = {}
        self.offset = 0.0
        self._choose(byte_price)
        self._arrive(byte_price)
        self._convert()
        self._minimise()

    def _bool(self, seconds: float, tie: int = 0) -> Any:
        variable = self.cp.new_bool_var("")
        self.variables += 1
        self.terms.append((variable, seconds, tie))
        return variable

    def _choose(self, byte_price: float) -> None:
        """Constraint (1)."""
        for op in self.problem.ops:
            weight = self.problem.weight(op.name)
            costs = [weight * (choice.seconds + byte_price * choice.bytes) for choice in op.choices]
            base = min(costs, default=0.0)
            self.offset += base
            self.x[op.name] = [self._bool(cost - base, index) for index, cost in enumerate(costs)]
            self.cp.add_exactly_one(self.x[op.name])

    def _arrive(self, byte_price: float) -> None:
        """Constraint (2)."""
        ties: dict[str, dict[Layout, Any]] = {}
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

    def _tie(self, options: dict[Layout, Any], tie: str, ties: dict[str, dict[Layout, Any]]) -> None:
        self.cp.add_exactly_one(options.values())
        first = ties.setdefault(tie, options) if tie else options
        if first is not options:
            for layout in dict.fromkeys((*first, *options)):
                self.cp.add(options.get(layout, 0) == first.get(layout, 0))

    def _made(self) -> dict[str, dict[Layout, Any]]:
        """For each tensor and layout, the expression that says it is produced so."""
        made: dict[str, dict[Layout, Any]] = {name: dict(options) for name, options in self.y.items()}
        for op in self.problem.ops:
            by_layout: dict[Layout, list[Any]] = {}
            for choice, variable in zip(op.choices, self.x[op.name], strict=True):
                by_layout.setdefault(choice.output, []).append(variable)
            made[op.name] = {layout: sum(variables) for layout, variables in by_layout.items()}
        return made

    def _readers(self) -> dict[str, list[dict[Layout, Any]]]:
        """For each tensor, its readers: layout to the expression that says it is read so; equal ones once."""
        readers: dict[str, list[dict[Layout, Any]]] = {}
        for op in self.problem.ops:
            seen: set[tuple[str, tuple[Layout, ...]]] = set()
            for position, tensor in enumerate(op.operands):
                wanted = tuple(choice.inputs[position] for choice in op.choices)
                if (tensor, wanted) in seen:
                    continue
                seen.add((tensor, wanted))
                by_layout: dict[Layout, list[Any]] = {}
                for layout, variable in zip(wanted, self.x[op.name], strict=True):
                    by_layout.setdefault(layout, []).append(variable)
                readers.setdefault(tensor, []).append({layout: sum(v) for layout, v in by_layout.items()})
        for output, options in zip(self.problem.outputs, self.z, strict=True):
            readers.setdefault(output.tensor, []).append(dict(options))
        return readers

    def _convert(self) -> None:
        made = self._made()
        for tensor, readers in self._readers().items():
            if len(readers) == 1:
                self.copies[tensor] = self._transport(tensor, made[tensor], readers[0])
            else:
                self.copies[tensor] = self._copies(tensor, made[tensor], readers)
                self._reads(self.copies[tensor], made[tensor], readers)

    def _transport(self, tensor: str, made: dict[Layout, Any], reader: dict[Layout, Any]) -> _Copies:
        """Constraint (6)."""
        best = self.best.get(tensor, {})
        moves: dict[tuple[Layout, Layout], Any] = {}
        for a in made:
            for b in reader:
                if a == b:
                    moves[a, b] = self._bool(0.0)
                elif (a, b) in best:
                    moves[a, b] = self._bool(self.problem.weight(tensor) * best[a, b][0], 1)
        for a, expression in made.items():
            self.cp.add(sum(v for (p, _), v in moves.items() if p == a) == expression)
        for b, expression in reader.items():
            self.cp.add(sum(v for (_, q), v in moves.items() if q == b) == expression)
        return _Copies([{pair: v for pair, v in moves.items() if pair[0] != pair[1]}])

    def _copies(self, tensor: str, made: dict[Layout, Any], readers: list[dict[Layout, Any]]) -> _Copies:
        """Constraints (3) and (4)."""
        best = self.best.get(tensor, {})
        targets = tuple(dict.fromkeys([b for reader in readers for b in reader]))
        hubs = self.problem.hubs.get(tensor)
        via = tuple(dict.fromkeys([*targets, *(b for _, b in best if hubs is None or b in hubs)]))
        copies = _Copies()
        reached: dict[Layout, list[Any]] = {}
        for depth in range(1, len(readers) + 1):
            level: dict[tuple[Layout, Layout], Any] = {}
            last = depth == len(readers)
            for b in targets if last else via:
                for a in made if depth == 1 else reached:
                    if (a, b) not in best or (depth > 1 and not self._helps(tensor, made, a, b)):
                        continue
                    level[a, b] = self._bool(self.problem.weight(tensor) * best[a, b][0], 1)
                    self.cp.add(level[a, b] <= (made[a] if depth == 1 else sum(reached[a])))
            copies.depths.append(level)
            reached = {}
            for (_, b), variable in level.items():
                reached.setdefault(b, []).append(variable)
        return copies

    def _helps(self, tensor: str, made: dict[Layout, Any], a: Layout, b: Layout) -> bool:
        """Whether a copy b from copy a can be cheaper than straight from what is produced, for some product."""
        best = self.best[tensor]
        return any(p not in (a, b) and ((p, b) not in best or best[a, b][0] < best[p, b][0]) for p in made)

    def _reads(self, copies: _Copies, made: dict[Layout, Any], readers: list[dict[Layout, Any]]) -> None:
        """Constraint (5)."""
        there: dict[Layout, list[Any]] = {}
        for level in copies.depths:
            for (_, b), variable in level.items():
                there.setdefault(b, []).append(variable)
        for reader in readers:
            for layout, expression in reader.items():
                self.cp.add(expression <= made.get(layout, 0) + sum(there.get(layout, [])))

    def _minimise(self) -> None:
        scale = self.offset + max((seconds for _, seconds, _ in self.terms), default=0.0)
        self.unit = max(scale, 1e-12) / RESOLUTION
        # A tie step is far below any real difference; it only makes equal answers come out in one order.
        self.cp.minimize(sum((int(s / self.unit) + tie) * variable for variable, s, tie in self.terms))
        most_ties = sum(len(op.choices) for op in self.problem.ops) + self.variables
        self.offset -= self.unit * most_ties

    def read(self, solver: cp_model.CpSolver) -> Answer:
        """The solution, with conversions that are composed of several steps spelt out and none repeated."""
        strategies = {name: [bool(solver.value(v)) for v in x].index(True) for name, x in self.x.items()}
        sources = {name: next(l for l, v in y.items() if solver.value(v)) for name, y in self.y.items()}
        outputs = tuple(next(l for l, v in z.items() if solver.value(v)) for z in self.z)
        start = dict(sources)
        for op in self.problem.ops:
            start[op.name] = op.choices[strategies[op.name]].output
        conversions: list[tuple[str, Layout, Layout]] = []
        for tensor, copies in self.copies.items():
            held = {start[tensor]}
            for level in copies.depths:
                for (a, b), variable in level.items():
                    if not solver.value(variable) or b in held:
                        continue
                    for p, q in zip(*(lambda way: (way, way[1:]))(path(self.best[tensor], a, b)), strict=False):
                        if q not in held:
                            conversions.append((tensor, p, q))
                            held.add(q)
        return Answer(strategies, sources, outputs, tuple(conversions), 0.0, 0.0, 0.0)
