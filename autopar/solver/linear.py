"""Linear programs by GLOP, through OR-Tools' `model_builder`."""

from __future__ import annotations

from typing import Any

from ortools.linear_solver.python import model_builder

LinearExpr = model_builder.LinearExpr
INFEASIBLE, OPTIMAL = model_builder.SolveStatus.INFEASIBLE, model_builder.SolveStatus.OPTIMAL

TOLERANCE = 1e-6
"""Relative error of an optimum of GLOP, whose feasibility tolerances are 1e-8."""


def linear_program() -> Any:
    """An empty `model_builder.Model`, whose constructor has no types."""
    return model_builder.Model()  # type: ignore[no-untyped-call]


def solve_linear(program: Any) -> tuple[Any, model_builder.SolveStatus]:
    """The solver, which holds the solution if there is one, and whether there is."""
    solver = model_builder.Solver("GLOP")
    return solver, solver.solve(program)
