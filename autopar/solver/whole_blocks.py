"""When ranks of several stages have time and room for the whole blocks of one run.

Of a run's blocks, k on rank q take at least u_q(k) seconds a micro-batch: each of them, on a stage with a micro-batches
in flight and under option i, s_i seconds and r_i + a h_i bytes, and all of them no more than the room R_q. For every
price y >= 0 of a byte (Lagrange), with g(a) = min over i of s_i + y (r_i + a h_i),

    u_q(k) >= sum over stages that surely have a block of the run, of g(a) + (k - their number) g(least a) - y R_q

so that the largest of that over some prices is a bound. Stage j of S has one of the blocks j to N - S + j of the chain
at least; where these are all of the run, it surely has one of it.

u_q grows with k, and a step of V seconds has room for k blocks only if idle_q + m u_q(k) + o <= V. So n blocks fit on
all ranks together only if V is at least the n-th least of these times, over all q and k.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autopar.solver.chain import Floats, bytes_of, chain_of, least_of_stages, work_of
from autopar.solver.stages import StageProblem

PRICES = 24
"""Prices of a byte that are tried at most."""


def least_of_whole(problem: StageProblem, index: int, idle: Floats) -> float:
    """The least V - o at which ranks have room in time for all blocks of the run ``index``, infinite if there is none;
    ``idle``: seconds of each rank that it surely spends otherwise."""
    count = problem.runs[index].count
    times = idle[:, None] + problem.micro_batches * _seconds(problem, index)
    return float(np.partition(times.ravel(), count - 1)[count - 1])


def whole_blocks_fit(problem: StageProblem, index: int) -> bool:
    """Whether that is finite: ranks have room for all of them, each rank for those that it has."""
    run, ranks, fit = problem.runs[index], _ranks(problem, index), 0
    leanest = {alive: min(bytes_of(option, alive) for option in run.options) for alive in _flying(ranks)}
    for sure, least, room in ranks:
        left = room + 1.0 - sum(leanest[alive] for alive in sure)
        if left >= 0.0:
            more = left / leanest[least] if leanest[least] > 0.0 else run.count
            fit += len(sure) + int(min(more, run.count))
    return fit >= run.count


_Rank = tuple[list[int], int, float]
"""See `_ranks`."""


def _ranks(problem: StageProblem, index: int) -> list[_Rank]:
    """Of each rank, when most is in flight: how many micro-batches on each stage that surely has a block of the run, on
    the stage with the fewest, and bytes of room."""
    sure, found = _sure(problem, index), []
    for rank in range(problem.pp):
        moment = max(problem.held(rank), key=lambda moment: sum(alive for alive, _ in moment))
        counted = [alive for stage, (alive, _) in zip(problem.own(rank), moment, strict=True) if sure[stage]]
        found.append((counted, min(alive for alive, _ in moment), max(problem.spare(rank), 0.0)))
    return found


def _flying(ranks: Sequence[_Rank]) -> list[int]:
    """All numbers of micro-batches that count."""
    return sorted({alive for sure, least, _ in ranks for alive in (*sure, least)})


def _seconds(problem: StageProblem, index: int) -> Floats:
    """u of the docstring: by rank, and by number of blocks from 1 to all."""
    run, ranks = problem.runs[index], _ranks(problem, index)
    flying = _flying(ranks)
    place = {alive: column for column, alive in enumerate(flying)}
    prices = _prices(problem, index, flying)
    works = np.array([work_of(option) for option in run.options])
    sizes = np.array([[bytes_of(option, alive) for alive in flying] for option in run.options])
    # By micro-batches in flight and price: g of the docstring.
    each = (works[:, None, None] + sizes[:, :, None] * prices).min(axis=0)
    leanest, numbers = sizes.min(axis=0), np.arange(1, run.count + 1)
    counted = np.array([[sure.count(alive) for alive in flying] for sure, _, _ in ranks])
    fewest = [place[least] for _, least, _ in ranks]
    room = np.array([room for _, _, room in ranks])
    beside = numbers - counted.sum(axis=1)[:, None]
    # By rank, price and number of blocks.
    seconds = (counted @ each - room[:, None] * prices)[:, :, None] + each[fewest][:, :, None] * beside[:, None]
    needed = (counted @ leanest)[:, None] + leanest[fewest][:, None] * beside
    found = np.where(needed > room[:, None] + 1.0, np.inf, seconds.max(axis=1).clip(0.0))
    for row, (sure, _, _) in zip(found, ranks, strict=True):
        # The rank has no fewer blocks than stages that surely have one.
        row[: len(sure)] = row[min(len(sure), run.count) - 1]
    return found


def _sure(problem: StageProblem, index: int) -> list[bool]:
    """Whether each stage surely has a block of the run."""
    mine = (chain_of(problem).run_of == index).astype(float)
    return [bool(least) for least in least_of_stages(mine, problem.stages)]


def _prices(problem: StageProblem, index: int, flying: list[int]) -> Floats:
    """Prices at which the best option changes, for any number of micro-batches in flight."""
    chain, found = chain_of(problem), {0.0}
    for alive in flying:
        found |= {step.seconds / step.nbytes for step in chain.hull(alive) if step.run == index}
    ordered = sorted(found)
    places = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), PRICES)).astype(int))
    return np.array([ordered[place] for place in places])
