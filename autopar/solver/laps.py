"""The stage problem for several stages a rank: a bound from what ranks can hold together.

Constraint (5) of `stages` says of rank q, whatever its stages are: V >= idle_q + m w_q + o, where idle_q is the way
there and, if backwards are not halved, back through at least the first q blocks of the chain, and what its stages take
beside their blocks, and o at least the even share of the optimizer. Summed over ranks, with W the fastest seconds of
all blocks and R those that memory forces on top (a knapsack over all ranks' bytes, each block with the fewest
micro-batches in flight that any stage has at some time when most is):

    p V >= m (W + R) + sum_q idle_q + p o

and since ranks hold whole blocks, of the n blocks of the run with most work (`whole_blocks`, with u_q(k) the least
seconds of k of them on rank q):

    V >= the n-th least of all idle_q + m u_q(k) + o, k = 1, 2, ...
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autopar.solver.bounds import crossings_of
from autopar.solver.chain import Chain, bytes_of, chain_of, fastest, work_of
from autopar.solver.stages import BlockRun, StageProblem
from autopar.solver.whole_blocks import least_of_whole, whole_blocks_fit

Ints = NDArray[np.int64]


def laps_bound(problem: StageProblem) -> float:
    """No spread has a lower V; infinite if memory is too small for any."""
    chain = chain_of(problem)
    ranks, m, c = problem.pp, problem.micro_batches, problem.transfer_s
    forced = forced_seconds(problem, chain)
    optimizer = float(chain.optimizer[-1]) / ranks
    place = np.arange(ranks)
    idle = chain.forward[place] + place * c
    first = float(chain.after[1])
    if not problem.halves:
        idle = idle + np.where(place > 0, place * c + (chain.work - chain.forward)[place] + first, 0.0)
    ahead_s, back_s, first_s, last_s = problem.beside_s()
    beside = m * (ahead_s + back_s) + first_s + last_s
    idle = idle + [beside[list(problem.own(rank))].sum() for rank in range(ranks)]
    work = float(chain.work[-1])
    bound = (m * (work + forced) + float(idle.sum())) / ranks + optimizer
    crossings = crossings_of(problem.schedule, ranks, problem.vpp)
    if not problem.halves:
        bound = max(bound, work + 2 * crossings * c + first + optimizer)
    bound = max(bound, least_of_whole(problem, _main(problem), idle) + optimizer)
    return bound * (1 - 1e-12)


def laps_fit(problem: StageProblem) -> bool:
    """Whether that is finite."""
    possible = forced_seconds(problem, chain_of(problem)) < float("inf")
    return possible and whole_blocks_fit(problem, _main(problem))


def forced_seconds(problem: StageProblem, chain: Chain) -> float:
    """R of the docstring, for one stage a rank or several; infinite if memory is too small for any spread."""
    flying = min(_flying(problem, rank) for rank in range(problem.pp))
    room = sum(max(0.0, problem.spare(rank)) for rank in range(problem.pp))
    lacking = sum(run.count * bytes_of(run.options[fastest(run)], flying) for run in problem.runs) - room
    seconds = 0.0
    for step in chain.hull(flying):
        taken = min(max(lacking, 0.0), problem.runs[step.run].count * step.nbytes)
        seconds += taken * step.seconds / step.nbytes
        lacking -= taken
    return seconds if lacking <= 1.0 else float("inf")


def _flying(problem: StageProblem, rank: int) -> int:
    """The fewest micro-batches in flight that any stage of a rank has when most is."""
    return max(min(alive for alive, _ in moment) for moment in problem.held(rank))


def _main(problem: StageProblem) -> int:
    """The run with most work."""
    return max(range(len(problem.runs)), key=lambda r: problem.runs[r].count * _fastest_s(problem.runs[r]))


def _fastest_s(run: BlockRun) -> float:
    return work_of(run.options[fastest(run)])
