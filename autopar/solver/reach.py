"""The stage problem for one stage a rank, exactly over the borders: dynamic programming along the chain.

D[q, e]: the least V of any way to put the first e blocks on the stages 0 to q, V being what constraint (5) of `stages`
says of each of these ranks alone:

    V_q(a, b) = F(a) + (q + waits) c + m (w_q(a, b) + d) + e + max(a_q, [q > 0] (q c + B(a) + a_0)) + o
    D[q, e]   = min over a of max(D[q-1, a], V_q(a, e))

with w_q the least seconds of the piece in the memory of rank q (`chain`), F and B the least seconds of the forwards and
backwards of the blocks before a, d and e what the stage takes beside its blocks (`StageProblem.beside`), o
the larger of the rank's own optimizer and the even share of all. So D[p-1, N] is a valid bound, and what it leaves out
of V (a rank waits for what earlier blocks recompute; the slowest optimizer) is small.

A second pass over the pieces whose V_q does not exceed that takes the most even of these spreads (least squares of the
seconds of ranks), since V leaves the stages that do not decide it open, and the simulator minds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.solver.bounds import waits_of
from autopar.solver.chain import Floats, chain_of, least_borders
from autopar.solver.stages import StageProblem

SLACK = 1e-4
"""How much of V the evenness of the other stages may cost."""


@dataclass(frozen=True, slots=True)
class Reached:
    """``bound``: no spread has a lower V. ``borders``: where the stages of an even one with about that V end."""

    bound: float
    borders: tuple[int, ...]


def reach(problem: StageProblem, even: bool = True) -> Reached | None:
    """None if nothing fits. ``even`` False: the bound alone is of use, and no borders are found."""
    chain = chain_of(problem)
    ranks, n, m, c = problem.pp, chain.blocks, problem.micro_batches, problem.transfer_s
    first = float(chain.after[1])
    after = chain.pieces(chain.after)
    back = (chain.work - chain.forward)[:, None] + first
    optimizer = np.maximum(chain.pieces(chain.optimizer), chain.optimizer[-1] / ranks)
    above = np.tril(np.full((n + 1, n + 1), np.inf))  # a piece ends behind its start
    rest = chain.forward[:, None] + optimizer + above
    costs: list[Floats] = []
    works: list[Floats] = []
    reached = np.full(n + 1, np.inf)
    reached[0] = 0.0
    ahead_s, back_s, first_s, last_s = problem.beside_s()
    beside = m * (ahead_s + back_s) + first_s + last_s
    for rank in range(ranks):
        work = chain.seconds(rank)
        there = rank * c
        cost = m * work + beside[rank] + rest + there + waits_of(rank, ranks, m, 1) * c
        cost += np.maximum(after, there + back) if rank else after
        costs.append(cost)
        works.append(work)
        allowed = _allowed(problem, cost, rank)
        reached = np.min(np.maximum(reached[:, None], allowed), axis=0)
    bound = float(reached[-1])
    through = float(chain.work[-1] + 2 * (ranks - 1) * c + first + chain.optimizer[-1] / ranks)
    if not np.isfinite(bound):
        return None
    bound = max(bound, through) * (1 - 1e-12)
    return Reached(bound, _even(problem, costs, works, max(bound, through) * (1 + SLACK)) if even else ())


def _allowed(problem: StageProblem, cost: Floats, rank: int) -> Floats:
    """The cost matrix where borders may be: a first stage starts at 0; fixed stages have the blocks they are given."""
    if not problem.fixed and rank:
        return cost
    start = sum(problem.fixed[:rank])
    kept = np.full_like(cost, np.inf)
    ends = slice(start + problem.fixed[rank], start + problem.fixed[rank] + 1) if problem.fixed else slice(None)
    kept[start, ends] = cost[start, ends]
    return kept


def _even(problem: StageProblem, costs: list[Floats], works: list[Floats], limit: float) -> tuple[int, ...]:
    """The ends of the stages of the most even spread of those with V up to ``limit``."""
    return least_borders(
        _allowed(problem, np.where(cost <= limit, np.square(np.where(cost <= limit, work, 0.0)), np.inf), rank)
        for rank, (cost, work) in enumerate(zip(costs, works, strict=True))
    )
