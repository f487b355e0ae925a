"""The stage problem for several stages a rank: a bound from what ranks can hold together, and an even spread.

Constraint (5) of `stages` says of rank q, whatever its stages are: V >= idle_q + m w_q + o, where idle_q is the way
there and, if backwards are not halved, back through at least the first q blocks of the chain, and what its stages take
beside their blocks, and o at least the even share of the optimizer. Summed over ranks, with W the fastest seconds of
all blocks and R those that memory forces on top (a knapsack over all ranks' bytes, each block with the fewest
micro-batches in flight that any stage has at some time when most is):

    p V >= m (W + R) + sum_q idle_q + p o

and since ranks hold whole blocks, of the n blocks of the run with most work (`whole_blocks`, with u_q(k) the least
seconds of k of them on rank q):

    V >= the n-th least of all idle_q + m u_q(k) + o, k = 1, 2, ...

The spread: stages as even as whole blocks allow (least squares, by dynamic programming), then blocks moved from ranks
with more work to ranks with less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from autopar.solver.bounds import crossings_of
from autopar.solver.chain import Chain, Floats, bytes_of, chain_of, fastest, least_borders, work_of
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


def even_borders(problem: StageProblem) -> tuple[int, ...]:
    """Where the stages of an even spread end, whatever the memory."""
    return _even_borders(replace(problem, capacity=0.0))


@lru_cache(maxsize=8)
def _even_borders(problem: StageProblem) -> tuple[int, ...]:
    if problem.fixed:
        return tuple(int(end) for end in np.cumsum(problem.fixed))
    chain = chain_of(problem)
    squares = np.square(chain.pieces(chain.work)) + np.tril(np.full((chain.blocks + 1, chain.blocks + 1), np.inf))
    return _balanced(problem, chain, list(least_borders([squares] * problem.stages)))


def _balanced(problem: StageProblem, chain: Chain, borders: list[int]) -> tuple[int, ...]:
    """Blocks of the rank with most work moved to the one with least, as long as that evens their work out."""
    owners = [problem.own(rank) for rank in range(problem.pp)]
    owned = np.zeros((problem.stages, problem.pp))
    for rank, own in enumerate(owners):
        owned[list(own), rank] = 1.0
    found = np.array(borders)
    loads = _loads(chain, found[None], owned)[0]
    for _ in range(2 * problem.stages):
        moved = _moved(found, owners[int(np.argmax(loads))], owners[int(np.argmin(loads))])
        if not len(moved):
            break
        after = _loads(chain, moved, owned)
        squares = np.square(after).sum(axis=1)
        best = int(np.argmin(squares))
        if squares[best] >= np.square(loads).sum() * (1 - 1e-9):
            break
        found, loads = moved[best], after[best]
    return tuple(found.tolist())


def _moved(borders: Ints, givers: Sequence[int], takers: Sequence[int]) -> Ints:
    """Borders by which one of these stages has a block less and one of those a block more, no stage empty; a row for
    each pair that can."""
    pairs = np.array([(giver, taker) for giver in givers for taker in takers])
    low, high = pairs.min(axis=1)[:, None], pairs.max(axis=1)[:, None]
    between = (np.arange(len(borders)) >= low) & (np.arange(len(borders)) < high)
    moved = borders + np.where(between, np.where(pairs[:, :1] < pairs[:, 1:], -1, 1), 0)
    return moved[(np.diff(moved, axis=1, prepend=0) > 0).all(axis=1)]


def _loads(chain: Chain, borders: Ints, owned: Floats) -> Floats:
    """Seconds of work of every rank, a row for each row of borders; ``owned``: which stages are whose."""
    ends = chain.work[borders]
    return np.asarray(np.diff(ends, axis=1, prepend=0.0) @ owned)
