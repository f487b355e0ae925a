"""When ranks of several stages have time and room for the whole blocks of one run.

Of a run's blocks, k on rank q take at least u_q(k) seconds a micro-batch: each of them, on a stage with a micro-batches
in flight and under option i, s_i seconds and r_i + a h_i bytes (at times with its gradients), and all of them no more
than the room R_q. For every price y >= 0 of a byte (Lagrange), with g(a) = min over i of s_i + y (r_i + a h_i),

    u_q(k) >= sum over stages that surely have a block of the run, of g(a) + (k - their number) g(least a) - y R_q

so that the largest of that over some prices, and over times (`standing`), is a bound. Stage j of S has one of the
blocks j to N - S + j of the chain at least; where these are all of the run, it surely has one of it.

u_q grows with k, and a step of V seconds has room for k blocks only if idle_q + m u_q(k) + o <= V. So n blocks fit on
all ranks together only if V is at least the n-th least of these times, over all q and k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autopar.solver.chain import Floats, bytes_of, chain_of, least_of_stages, work_of
from autopar.solver.stages import StageProblem
from autopar.solver.standing import Holding, least_holding

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
    run, times = problem.runs[index], _times(problem, index)
    leanest = {held: min(bytes_of(option, *held) for option in run.options) for held in _held(times)}
    fits = [run.count] * problem.pp
    for rank, sure, least, room in times:
        left = room + 1.0 - sum(leanest[held] for held in sure)
        more = left / leanest[least] if leanest[least] > 0.0 else run.count
        fits[rank] = min(fits[rank], len(sure) + int(min(more, run.count)) if left >= 0.0 else 0)
    return sum(fits) >= run.count


class _Time(NamedTuple):
    """A time of ``rank``: what each stage holds that surely has a block of the run, what every stage holds at least,
    and bytes of room."""

    rank: int
    sure: list[Holding]
    least: Holding
    room: float


def _times(problem: StageProblem, index: int) -> list[_Time]:
    """The times of all ranks."""
    sure = _sure(problem, index)
    return [
        _Time(
            rank,
            [held for stage, held in zip(problem.own(rank), time, strict=True) if sure[stage]],
            least_holding(time),
            max(problem.spare(rank), 0.0),
        )
        for rank in range(problem.pp)
        for time in problem.standing(rank)
    ]


def _held(times: Sequence[_Time]) -> list[Holding]:
    """All that stages hold."""
    return sorted({held for time in times for held in (*time.sure, time.least)})


def _seconds(problem: StageProblem, index: int) -> Floats:
    """u of the docstring: by rank, and by number of blocks from 1 to all."""
    run, times = problem.runs[index], _times(problem, index)
    held = _held(times)
    place = {one: column for column, one in enumerate(held)}
    prices = _prices(problem, index, sorted({alive for alive, _ in held}))
    works = np.array([work_of(option) for option in run.options])
    sizes = np.array([[bytes_of(option, *one) for one in held] for option in run.options])
    # By what is held and price: g of the docstring.
    each = (works[:, None, None] + sizes[:, :, None] * prices).min(axis=0)
    leanest, numbers = sizes.min(axis=0), np.arange(1, run.count + 1)
    counted = np.array([[time.sure.count(one) for one in held] for time in times])
    fewest = [place[time.least] for time in times]
    room = np.array([time.room for time in times])
    beside = numbers - counted.sum(axis=1)[:, None]
    # By time, price and number of blocks.
    seconds = (counted @ each - room[:, None] * prices)[:, :, None] + each[fewest][:, :, None] * beside[:, None]
    needed = (counted @ leanest)[:, None] + leanest[fewest][:, None] * beside
    found = np.where(needed > room[:, None] + 1.0, np.inf, seconds.max(axis=1).clip(0.0))
    for row, time in zip(found, times, strict=True):
        # The rank has no fewer blocks than stages that surely have one.
        row[: len(time.sure)] = row[min(len(time.sure), run.count) - 1]
    begins = np.unique([time.rank for time in times], return_index=True)[1]
    return np.asarray(np.maximum.reduceat(found, begins, axis=0))


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
