"""The cheapest sharding of a block: the ILP of `intra_model`, by its linear relaxation and CP-SAT.

**Fixing by reduced costs.** Let c be the seconds of the variables, A x the rows with right sides b, and p the duals of
the relaxation (not above zero for rows <=). For x in [0, 1]

    c·x  >=  p·b + sum_j min(0, r_j)  =  L,    r = c - A'p

and a solution in which x_j = 1 takes L + r_j at least (weak duality: any p of these signs will do, so what GLOP rounds
only loosens the bound). CP-SAT therefore sees those variables first whose r_j is small, and if its optimum v is not
above L + the least r_j that was left out, no other solution is better. Else those below v - L are all that a better one
can have, and a second time ends it. (What ties may shift counts as above, so that of equal answers the same one is
found whatever the duals.) Relaxations are mostly within a few thousandths of the optimum, so half to nine tenths of the
variables never get there.

Costs become integers for CP-SAT, rounded down by less than ``unit`` each, hence the optimum of the integers times
``unit`` is a valid bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from autopar.errors import UnsupportedError
from autopar.solver.intra_model import BlockModel, Row, Sum
from autopar.solver.linear import INFEASIBLE, OPTIMAL, TOLERANCE, Floats, Rows, duals_of, solve_linear
from autopar.solver.problem import Answer, Problem, price

RESOLUTION = 2**36
"""Integer steps into which the largest sensible objective is cut."""

NEAR, FURTHER = 1e-4, 16.0
"""Reduced costs of the variables that are tried first, as a share of the objective's scale; how many times larger they
may be each time that those allow no solution."""

FEW = 500
"""Variables up to which CP-SAT sees all of them."""


class NoShardingError(UnsupportedError):
    """No combination of the operators' strategies is possible. Between which of them, which takes a while to find, is
    looked for when it is told."""

    def __init__(self, problem: Problem, why: str) -> None:
        super().__init__(why)
        self.problem = problem

    def __str__(self) -> str:
        found = conflict(self.problem)
        if not found:
            names = ", ".join(op.name for op in self.problem.ops[:3])
            return f"no sharding of the block ({names}, ...) found: {self.args[0]}"
        return (
            f"no sharding of these operators on the axes asked for: {', '.join(found)}; the layouts that their "
            "strategies want or give cannot be converted into one another, nor into what passes between blocks; fix "
            "other sizes of cp and tp"
        )


def solve(problem: Problem, byte_price: float = 0.0, work_limit: float = 30.0) -> Answer:
    """The cheapest answer by ``seconds + byte_price * bytes``.

    ``work_limit`` is CP-SAT's deterministic time. Deterministic: one worker, fixed seed, ties broken by the order of
    strategies. Raises NoShardingError when no combination of layouts is possible or none was found within the limit.
    """
    model = BlockModel(problem, byte_price)
    reduced = _reduced(model)
    within, ties = NEAR * model.scale, _most_ties(model) * _unit(model)
    while True:
        kept = reduced.costs <= within
        found = _solve_booleans(model, kept, work_limit)
        rest = reduced.least + float(reduced.costs[~kept].min(initial=np.inf))
        if isinstance(found, str):
            if rest < np.inf:
                within *= FURTHER
                continue
            raise NoShardingError(problem, f"CP-SAT says {found}")
        needed = found.value + 2 * ties - reduced.least
        if needed <= within or rest == np.inf or not found.proved:
            break
        within = needed
    answer = model.read(found.chosen)
    seconds, size = price(problem, answer)
    bound = min(found.bound, rest) + model.offset
    return replace(
        answer,
        seconds=seconds,
        bytes=size,
        bound=min(bound, seconds + byte_price * size),
        status="optimal" if found.proved else "feasible",
        statistics={"variables": float(len(model.terms)), "tried": float(kept.sum())},
    )


def conflict(problem: Problem) -> list[str]:
    """Operators of constraints that no layouts meet, none of which can be left out; no operators if parts of strategies
    would meet all."""
    model = BlockModel(problem, 0.0)
    if _meets(model, model.rows):
        return []
    # Which are left depends on the order in which they are tried.
    return min((_conflict(model, rows) for rows in (model.rows, model.rows[::-1])), key=len)


def _conflict(model: BlockModel, rows: list[Row]) -> list[str]:
    size = len(rows)
    while size := size // 2:
        start = 0
        while start < len(rows):
            fewer = [*rows[:start], *rows[start + size :]]
            if _meets(model, fewer):
                start += size
            else:
                rows = fewer
    used = {place for plus, minus, _, _ in rows for place in (*plus, *minus)}
    return [name for name, places in model.x.items() if used.intersection(places)]


def _meets(model: BlockModel, rows: Sequence[Row]) -> bool:
    """Whether the relaxation has a solution that meets these rows."""
    return solve_linear(_linear(model, rows))[1] != INFEASIBLE


def relaxed_bound(problem: Problem) -> float:
    """A lower bound on the seconds of every answer, in a fraction of the time of `solve`: the linear relaxation, by
    GLOP."""
    model = BlockModel(problem, 0.0)
    solver, status = solve_linear(_linear(model))
    if status != OPTIMAL:
        return model.offset
    return float(solver.objective_value) * model.scale * (1 - TOLERANCE) + model.offset


@dataclass(frozen=True, slots=True)
class _Reduced:
    """``least``: seconds, beside the offset, that no solution is below; ``costs``: how far above it each is in which a
    variable is one."""

    least: float
    costs: Floats


def _linear(model: BlockModel, some: Sequence[Row] | None = None) -> Any:
    """The relaxation, its costs in parts of the model's scale. ``some``: of the rows, if not all count."""
    rows = Rows()
    variables = rows.variables([1.0] * len(model.terms))
    for plus, minus, low, high in model.rows if some is None else some:
        places = [variables[place] for place in (*plus, *minus)]
        rows.add_terms(places, [1.0] * len(plus) + [-1.0] * len(minus), low, high)
    return rows.cheapest([seconds / model.scale for seconds, _ in model.terms])


def _reduced(model: BlockModel) -> _Reduced:
    """By the duals of the relaxation; zero of everything if there are few variables, or GLOP has no duals."""
    costs = np.array([seconds for seconds, _ in model.terms])
    nothing = _Reduced(0.0, np.zeros(len(costs)))
    if len(costs) <= FEW:
        return nothing
    linear = _linear(model)
    solver, status = solve_linear(linear)
    if status != OPTIMAL:
        return nothing
    duals = duals_of(linear, solver) * model.scale
    low, high = np.array([row[2:] for row in model.rows], dtype=float).T
    duals = np.where(low < high, np.minimum(duals, 0.0), duals)
    rows, places, signs = model.matrix()
    reduced = costs - np.bincount(places, weights=signs * duals[rows], minlength=len(costs))
    least = float(duals @ high + np.minimum(reduced, 0.0).sum())
    error = 1e-9 * model.scale  # of these sums
    return _Reduced(least - error, np.maximum(reduced, 0.0))


@dataclass(frozen=True, slots=True)
class _Solved:
    """What CP-SAT chose of some of the variables: its seconds and those that none of these is below, beside the offset;
    whether it is the best of them."""

    chosen: list[bool]
    value: float
    bound: float
    proved: bool


def _solve_booleans(model: BlockModel, kept: Any, work_limit: float) -> _Solved | str:
    """By CP-SAT, all other variables zero; its status if it finds nothing."""
    cp = cp_model.CpModel()
    places = np.flatnonzero(kept).tolist()
    variables = {place: cp.new_bool_var("") for place in places}
    for plus, minus, low, high in model.rows:
        ours, theirs = _of(variables, plus), _of(variables, minus)
        if low == high == 1 and not minus:
            cp.add_exactly_one(ours)
        elif ours or theirs:
            signs = [1] * len(ours) + [-1] * len(theirs)
            cp.add_linear_constraint(cp_model.LinearExpr.weighted_sum(ours + theirs, signs), low, high)
    # A tie step is far below any real difference; it only makes equal answers come out in one order.
    unit = _unit(model)
    terms = [model.terms[place] for place in places]
    costs = [int(seconds / unit) + tie for seconds, tie in terms]
    cp.minimize(cp_model.LinearExpr.weighted_sum(list(variables.values()), costs))
    solver = cp_model.CpSolver()
    solver.parameters.catch_sigint_signal = False  # Ctrl-C is Python's, as everywhere else
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = work_limit
    solver.parameters.linearization_level = 2
    solver.parameters.cp_model_probing_level = 0
    status = solver.solve(cp)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return str(solver.status_name(status))
    chosen = [False] * len(model.terms)
    for place, variable in variables.items():
        chosen[place] = solver.boolean_value(variable)
    value = float(sum(seconds for (seconds, _), one in zip(model.terms, chosen, strict=True) if one))
    bound = (solver.best_objective_bound - _most_ties(model)) * unit
    return _Solved(chosen, value, bound, status == cp_model.OPTIMAL)


def _unit(model: BlockModel) -> float:
    """Seconds of one integer step of CP-SAT's objective."""
    return model.scale / RESOLUTION


def _most_ties(model: BlockModel) -> int:
    """Steps that places among equals and rounding down may add to a solution."""
    return sum(len(op.choices) for op in model.problem.ops) + len(model.terms)


def _of(variables: dict[int, Any], places: Sum) -> list[Any]:
    return [variables[place] for place in places if place in variables]
