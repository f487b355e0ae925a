"""What a schedule costs at least, however the work is spread over its stages: weights of forward and backward seconds.

A step takes as long as the longest path through its actions: each waits for the one before it on its rank and for what
it receives (transfers, and pairs that run as one, left out: both only add). A path counts c_s forwards and d_s
backwards of stage s, so that whatever the stages' seconds f and b are, T >= sum_s (c_s f_s + d_s b_s); and the same for
any average of paths. With alpha = min_s c_s and beta = min_s d_s of the average,

    T >= alpha sum_s f_s + beta sum_s b_s

for every spread of a model over the stages, uneven ones included (and more, where every stage surely has something, and
where its first forward and its last backward take longer than others). `weights` seeks the average that bounds best: a
game between a spread that tries to be fast and a path through it that tries to be long, solved by cutting planes (the
spread is the optimum of a linear program over the paths known so far, pulled towards the best so far; its dual is the
average). Wherever it ends, the average is one of paths, and the bound holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from autopar.schedule import SCHEDULES
from autopar.solver.chain import Floats
from autopar.solver.linear import OPTIMAL, LinearExpr, linear_program, solve_linear
from autopar.solver.walk import EACH, LANES, walk_of

MOST_ACTIONS = 8_000
"""Longer schedules are not walked through: they have so many micro-batches that little is waited for."""

ROUNDS, ENOUGH, PULL = 20, 3e-3, 0.2
"""Paths sought at most; how close is close enough; how much of the way to the program's spread the next one goes."""

FIRST, NOISE = 8, 0.03
"""Paths to begin with: those of the even spread, which are many, told apart by so much noise."""


@dataclass(frozen=True, slots=True)
class Weights:
    """How often paths pass what every stage takes: forward, backward or its input half, its weight half, what is more
    in its first forward and its last backward. ``average``: of the average path, a row each; ``every``: of all found.

    Without halves nothing passes the weight half."""

    halved: bool
    average: Floats
    every: Floats


@lru_cache(maxsize=4096)
def weights(
    schedule: str, ranks: int, vpp: int, micro_batches: int, forced: float = 0.0, once: float = 0.0
) -> Weights | None:
    """The average of paths that was found to bound best (valid whatever stages take) where each stage surely has its
    even share of ``forced`` of the work, and its first forward and last backward take a share of ``once`` more; None
    for schedules too long to walk through."""
    if ranks == 1 or 2 * micro_batches * ranks * vpp > MOST_ACTIONS:
        return None
    walk, halved = walk_of(schedule, ranks, vpp, micro_batches), SCHEDULES[schedule].splits_backward
    stages = walk.stages
    totals = [1 / 3, 1 / 3, 1 / 3, once / 2, once / 2] if halved else [1 / 3, 2 / 3, 0.0, once / 2, once / 2]
    even = np.repeat(np.array(totals) / stages, stages)
    least = np.concatenate([forced * even[: EACH * stages], even[EACH * stages :]])
    spread = best = even
    upper, lower, found = float("inf"), 0.0, np.zeros(len(even))
    drawn = np.random.default_rng(0)
    paths = [walk.longest(even * drawn.uniform(1 - NOISE, 1 + NOISE, len(even)))[1] for _ in range(FIRST)]
    program = _Program(np.array(totals), least)
    for path in paths:
        program.add(path)
    for _ in range(ROUNDS):
        length, counts = walk.longest(spread)
        paths.append(counts)
        program.add(counts)
        if length < upper:
            upper, best = length, spread
        fastest, average = program.solve(np.array(paths))
        parts = average.reshape(LANES, stages).min(axis=1)
        value = float(average @ least) + (1 - forced) * float(parts[:EACH] @ totals[:EACH])
        if value > lower:
            lower, found = value, average
        if upper - lower <= ENOUGH * upper:
            break
        spread = PULL * fastest + (1 - PULL) * best
    return Weights(halved, found.reshape(LANES, stages), np.array(paths).reshape(-1, LANES, stages))


class _Program:
    """The linear program of the fastest spread over the paths known so far."""

    def __init__(self, totals: Floats, least: Floats) -> None:
        self.least, self.free = least, EACH * (len(least) // LANES)
        self.linear = linear_program()
        self.seconds = [self.linear.new_num_var(float(low), 1.0, "") for low in least[: self.free]]
        self.step = self.linear.new_num_var(0.0, float("inf"), "")
        self.rows: list[Any] = []
        stages = len(least) // LANES
        for lane, total in enumerate(totals[:EACH].tolist()):
            self.linear.add(LinearExpr.sum(self.seconds[lane * stages : (lane + 1) * stages]) == total)
        self.linear.minimize(self.step)

    def add(self, path: Floats) -> None:
        """One more path that the step is at least as long as."""
        known = float(path[self.free :] @ self.least[self.free :])
        factors = [1.0, *(-path[: self.free]).tolist()]
        length = LinearExpr.weighted_sum([self.step, *self.seconds], factors)
        self.rows.append(self.linear.add(length >= known))

    def solve(self, paths: Floats) -> tuple[Floats, Floats]:
        """The fastest spread if these were all paths; and the average of the paths that shows it."""
        solver, status = solve_linear(self.linear)
        if status != OPTIMAL:
            return self.least, paths.mean(axis=0)
        spread = np.concatenate([[max(0.0, solver.value(one)) for one in self.seconds], self.least[self.free :]])
        parts = np.array([max(0.0, solver.dual_value(row)) for row in self.rows])
        total = parts.sum()
        return spread, (parts / total) @ paths if total > 0.0 else paths.mean(axis=0)
