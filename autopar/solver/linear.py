"""Linear programs by GLOP, through OR-Tools' `model_builder`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ortools.linear_solver.python import model_builder

LinearExpr = model_builder.LinearExpr
INFEASIBLE, OPTIMAL = model_builder.SolveStatus.INFEASIBLE, model_builder.SolveStatus.OPTIMAL

Floats = NDArray[np.float64]

TOLERANCE = 1e-6
"""Relative error of an optimum of GLOP, whose feasibility tolerances are 1e-8."""


def linear_program() -> Any:
    """An empty `model_builder.Model`, whose constructor has no types."""
    return model_builder.Model()  # type: ignore[no-untyped-call]


class Rows:
    """A linear program whose rows are given as arrays, filled through the builder's helper: its expressions take longer
    to make than such programs to solve."""

    def __init__(self) -> None:
        self._linear = linear_program()
        self._helper = self._linear.helper

    def variables(self, most: Sequence[float]) -> list[Any]:
        """One for each of ``most``, from 0 to that."""
        zeros = np.zeros(len(most))
        places = self._helper.add_var_array_with_bounds(zeros, np.array(most), np.zeros(len(most), dtype=bool), "")
        return [self._linear.var_from_index(place) for place in places.tolist()]

    def add(self, variables: Sequence[Any], factors: Floats, low: float, high: float = float("inf")) -> None:
        """low <= the sum of ``variables`` times ``factors`` <= high; those of factor 0 are left out."""
        used = np.flatnonzero(factors).tolist()
        self.add_terms([variables[place] for place in used], factors[used].tolist(), low, high)

    def add_terms(self, variables: Sequence[Any], factors: Sequence[float], low: float, high: float) -> None:
        """The same of lists, nothing left out."""
        row = self._helper.add_linear_constraint()
        self._helper.set_constraint_lower_bound(row, low)
        self._helper.set_constraint_upper_bound(row, high)
        self._helper.add_terms_to_constraint(row, variables, factors)

    def least(self, variable: Any) -> Any:
        """The program that makes one variable least."""
        self._linear.minimize(variable)
        return self._linear

    def cheapest(self, costs: Sequence[float]) -> Any:
        """The program that makes the sum of all variables times their ``costs`` least."""
        self._helper.set_objective_coefficients([*range(len(costs))], costs)
        return self._linear


def solve_linear(program: Any) -> tuple[Any, model_builder.SolveStatus]:
    """The solver, which holds the solution if there is one, and whether there is."""
    solver = model_builder.Solver("GLOP")
    # A fifth faster than its primal simplex for the relaxations of blocks.
    solver.set_solver_specific_parameters("use_dual_simplex:true")
    return solver, solver.solve(program)


def duals_of(program: Any, solver: Any) -> Floats:
    """The dual value of each row of a solved program: how much the least objective grows with the row's bound."""
    rows = range(program.num_constraints)
    return np.array([solver.dual_value(program.linear_constraint_from_index(row)) for row in rows])
