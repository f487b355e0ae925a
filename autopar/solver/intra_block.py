"""The cheapest sharding of a block: by eliminating one choice after the other (`block_tables`) where tables stay
narrow, as they do for the blocks of most models, else by the ILP (`intra_ilp`). Both are exact, of the same problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from autopar.solver import intra_ilp
from autopar.solver.block_tables import BlockTables, TooWideError
from autopar.solver.intra_ilp import NoShardingError
from autopar.solver.linear import Floats
from autopar.solver.problem import Answer, Problem, price

ROUNDING = 1e-12
"""Relative error of sums of some thousand numbers."""


def solve(problem: Problem, byte_price: float = 0.0, work_limit: float = 30.0) -> Answer:
    """The cheapest answer by ``seconds + byte_price * bytes``, of equal ones the one that comes first by the order of
    strategies. ``work_limit``: the ILP's deterministic time. Deterministic.

    Raises NoShardingError when no combination of layouts is possible or the ILP found none within its limit.
    """
    try:
        tables = BlockTables(problem)
        costs = tables.costs(byte_price, ties=True)
        answer = tables.best(costs)
    except TooWideError:
        return intra_ilp.solve(problem, byte_price, work_limit)
    if answer is None:
        raise NoShardingError(problem, "INFEASIBLE")
    seconds, size = price(problem, answer)
    bound = (seconds + byte_price * size) * (1 - ROUNDING) - tables.most_ties * costs.tie
    return replace(answer, seconds=seconds, bytes=size, bound=bound)


def least(problem: Problem, sharp: bool = True) -> tuple[float, bool]:
    """Seconds that no answer undercuts, and whether they are those of the best, or else, for a wide problem and unless
    ``sharp``, of its linear relaxation."""
    try:
        tables = BlockTables(problem)
        found = float(tables.least(tables.costs())) * (1 - ROUNDING)
    except TooWideError:
        return (_bound(problem), True) if sharp else (intra_ilp.relaxed_bound(problem), False)
    return found, True


def _bound(problem: Problem) -> float:
    try:
        return intra_ilp.solve(problem).bound
    except NoShardingError:
        return float("inf")


def least_with(problem: Problem, operators: Sequence[str]) -> Floats:
    """Seconds that no answer undercuts: [strategy of each of some operators, in the order of the problem]; of a wide
    problem for all what its relaxation says."""
    try:
        tables = BlockTables(problem)
        return tables.least(tables.costs(), operators) * (1 - ROUNDING)
    except TooWideError:
        strategies = [len(op.choices) for op in problem.ops if op.name in operators]
        return np.full(strategies, intra_ilp.relaxed_bound(problem))
