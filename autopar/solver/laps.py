"""The stage problem for several stages a rank: a bound from what ranks can hold together.

Constraint (5) of `stages` says of rank q, whatever its stages are: V >= idle_q + m w_q + o, where idle_q is the way
there and, if backwards are not halved, back through at least the first q blocks of the chain, and what its stages take
beside their blocks, and o at least the even share of the optimizer. Summed over ranks, with W the fastest seconds of
all blocks and R those that memory forces on top (a knapsack over all ranks' bytes, and their hosts', at some time of
each (`standing`), every block with the fewest micro-batches in flight that any stage has then):

    p V >= m (W + R) + sum_q idle_q + p o

and since ranks hold whole blocks, of the n blocks of the run with most work (`whole_blocks`, with u_q(k) the least
seconds of k of them on rank q):

    V >= the n-th least of all idle_q + m u_q(k) + o, k = 1, 2, ...
"""

from __future__ import annotations

import numpy as np

from autopar.solver.bounds import crossings_of
from autopar.solver.chain import Chain, bytes_of, chain_of, fastest, work_of
from autopar.solver.linear import INFEASIBLE, OPTIMAL, TOLERANCE, Rows, solve_linear
from autopar.solver.stages import BlockRun, StageProblem
from autopar.solver.standing import Holding, least_holding
from autopar.solver.whole_blocks import least_of_whole, whole_blocks_fit

BYTES = 2.0**30
"""The unit of bytes in linear programs."""


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
    return max(_forced_seconds(problem, chain, *time) for time in _times(problem))


def _forced_seconds(problem: StageProblem, chain: Chain, flying: int, kept: bool) -> float:
    """The same at one time of each rank. ``flying``: the fewest micro-batches in flight on a stage; ``kept``: whether
    all keep gradients."""
    room = sum(max(0.0, problem.spare(rank)) for rank in range(problem.pp))
    options = [run.options[fastest(run)] for run in problem.runs]
    held = sum(run.count * bytes_of(one, flying, kept) for run, one in zip(problem.runs, options, strict=True))
    lacking = held - room
    hosted = sum(run.count * flying * one.hosted for run, one in zip(problem.runs, options, strict=True))
    seconds = 0.0
    for step in chain.hull(flying):
        run = problem.runs[step.run]
        taken = min(max(lacking, 0.0), run.count * step.nbytes)
        seconds += taken * step.seconds / step.nbytes
        lacking -= taken
        hosted += taken / step.nbytes * flying * (run.options[step.after].hosted - run.options[step.before].hosted)
    if lacking > 1.0:
        return float("inf")
    if hosted <= problem.pp * problem.host_room:
        return seconds
    return max(seconds, _forced_by_both(problem, flying, kept, room))


def _forced_by_both(problem: StageProblem, flying: int, kept: bool, room: float) -> float:
    """The same where bytes of devices and of hosts are short: in parts of blocks, the least seconds that fit both."""
    rows = Rows()
    runs, seconds = problem.runs, []
    variables = rows.variables([float(run.count) for run in runs for _ in run.options])
    place = 0
    for run in runs:
        rows.add(variables[place : place + len(run.options)], np.ones(len(run.options)), run.count, run.count)
        place += len(run.options)
        seconds += [work_of(option) - work_of(run.options[fastest(run)]) for option in run.options]
    options = [option for run in runs for option in run.options]
    rows.add(variables, np.array([bytes_of(o, flying, kept) for o in options]) / BYTES, -float("inf"), room / BYTES)
    hosted = np.array([flying * o.hosted for o in options]) / BYTES
    rows.add(variables, hosted, -float("inf"), problem.pp * problem.host_room / BYTES)
    solver, status = solve_linear(rows.cheapest(seconds))
    if status == INFEASIBLE:
        return float("inf")
    return float(solver.objective_value) * (1 - TOLERANCE) if status == OPTIMAL else 0.0


def _times(problem: StageProblem) -> list[Holding]:
    """What every stage holds at least: at a time of each rank when most is in flight, and at one when all of its stages
    keep gradients."""
    ranks = [[least_holding(time) for time in problem.standing(rank)] for rank in range(problem.pp)]
    most = [max(times) for times in ranks]
    found = [most]
    if not all(kept for _, kept in most) and all(any(kept for _, kept in times) for times in ranks):
        found.append([max(time for time in times if time[1]) for times in ranks])
    return [least_holding(times) for times in found]


def _main(problem: StageProblem) -> int:
    """The run with most work."""
    return max(range(len(problem.runs)), key=lambda r: problem.runs[r].count * _fastest_s(problem.runs[r]))


def _fastest_s(run: BlockRun) -> float:
    return work_of(run.options[fastest(run)])
