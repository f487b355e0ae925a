"""Where the stages end of schedules with several stages a rank, whatever the memory.

`even_borders`: stages as even as whole blocks allow (least squares, by dynamic programming), then blocks moved from
ranks with more work to ranks with less.

Whole blocks leave some stages longer than others, and micro-batches wait for these; in which lap they are, and whether
on all ranks in the same one, decides how long. `fast_borders` begins with spreads that have them one after the other,
from any stage on, and moves blocks as long as the longest path through the schedule (`walk`) gets shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import permutations

import numpy as np

from autopar.schedule import SCHEDULES
from autopar.solver.chain import Chain, Floats, chain_of, fastest, least_borders
from autopar.solver.stages import BlockRun, Counts, Option, StageProblem
from autopar.solver.walk import LANES, LAST, Ints, is_long, step_lengths

STARTS, ROUNDS, BETTER = 3, 12, 1e-4
"""From how many spreads moves are tried, how many at most, and how much shorter a step each has to make."""

ALIKE = 50
"""Seconds are told apart to so many parts of those of the longest block: spreads of problems alike are one."""


def even_borders(problem: StageProblem) -> tuple[int, ...]:
    """Where the stages of an even spread end."""
    return _even_borders(replace(problem, capacity=0.0))


@lru_cache(maxsize=8)
def _even_borders(problem: StageProblem) -> tuple[int, ...]:
    ends = np.cumsum(problem.fixed) if problem.fixed else _evened(problem, chain_of(problem))
    return tuple(ends.tolist())


def fast_borders(problem: StageProblem) -> tuple[int, ...]:
    """Where the stages of a fast spread end, every block under its fastest option."""
    if problem.fixed or is_long(problem.stages, problem.micro_batches):
        return even_borders(problem)
    lanes = [_lanes(run.options[fastest(run)], problem.halves) for run in problem.runs]
    unit = max(sum(lane[:LAST]) for lane in lanes) / ALIKE or 1.0
    alike = tuple(tuple(round(second / unit) for second in lane) for lane in lanes)
    runs = tuple((run.count, lane) for run, lane in zip(problem.runs, alike, strict=True))
    return _fast_borders(problem.schedule, problem.pp, problem.vpp, problem.micro_batches, runs)


def _lanes(option: Option, halves: bool) -> tuple[float, ...]:
    weight = option.weight_s if halves else 0.0
    return option.forward_s, option.backward_s - weight, weight, 0.0, option.reduce_s


def length_of(problem: StageProblem, counts: Counts) -> float:
    """Seconds of the longest path through a step of these stages (`step_lengths`), transfers left out."""
    lanes = np.concatenate(_options_lanes(problem.runs, problem.halves))
    stages = np.array([[n for some in stage for n in some] for stage in counts]) @ lanes
    found = step_lengths(problem.schedule, problem.pp, problem.vpp, problem.micro_batches, stages[None])
    return float(found[0])


@lru_cache(maxsize=8)
def _options_lanes(runs: tuple[BlockRun, ...], halves: bool) -> list[Floats]:
    return [np.array([_lanes(option, halves) for option in run.options]) for run in runs]


@lru_cache(maxsize=256)
def _fast_borders(
    schedule: str, ranks: int, vpp: int, micro_batches: int, runs: tuple[tuple[int, tuple[int, ...]], ...]
) -> tuple[int, ...]:
    options = (_option(f, i, w, last) for _, (f, i, w, _, last) in runs)
    problem = StageProblem(
        tuple(BlockRun("", count, (option,)) for (count, _), option in zip(runs, options, strict=True)),
        ranks,
        micro_batches,
        0.0,
        schedule=schedule,
        vpp=vpp,
    )
    chain = chain_of(problem)
    each = np.repeat(np.array([lanes for _, lanes in runs], dtype=float), [count for count, _ in runs], axis=0)
    sums = np.concatenate([np.zeros((1, LANES)), np.cumsum(each, axis=0)])

    def lengths(borders: Ints) -> Floats:
        return step_lengths(schedule, ranks, vpp, micro_batches, np.diff(sums[borders], axis=1, prepend=0.0))

    windows = [row for row in windows_of(problem) if row is not None]
    starts = np.unique(np.array([_evened(problem, chain), *windows]), axis=0)
    found = lengths(starts)
    pairs = moves(schedule, ranks, vpp)
    ends = [_descended(starts[place], float(found[place]), pairs, lengths) for place in np.argsort(found)[:STARTS]]
    return tuple(min(ends, key=lambda end: end[0])[1].tolist())


def _descended(start: Ints, length: float, pairs: Ints, lengths: Callable[[Ints], Floats]) -> tuple[float, Ints]:
    """The step's length and the borders from where no move makes it shorter."""
    for _ in range(ROUNDS):
        near = moved(start, pairs)
        if not len(near):
            break
        found = lengths(near)
        if found.min() >= length * (1 - BETTER):
            break
        start, length = near[int(np.argmin(found))], float(found.min())
    return length, start


def _option(forward: float, inputs: float, weight: float, last: float) -> Option:
    return Option("", forward, inputs + weight, 0.0, 0.0, 0.0, reduce_s=last, weight_s=weight)


@lru_cache(maxsize=64)
def moves(schedule: str, ranks: int, vpp: int) -> Ints:
    """Pairs of stages, of which one may give a block to the other: neighbours, and those of one rank."""
    place, stages = SCHEDULES[schedule].rank_of, range(ranks * vpp)
    rank_of = [place(stage, ranks) for stage in stages]
    return np.array(
        [
            (giver, taker)
            for giver, taker in permutations(stages, 2)
            if abs(giver - taker) == 1 or rank_of[giver] == rank_of[taker]
        ]
    )


def _evened(problem: StageProblem, chain: Chain) -> Ints:
    """The spread of least squares, balanced."""
    squares = np.square(chain.pieces(chain.work)) + np.tril(np.full((chain.blocks + 1, chain.blocks + 1), np.inf))
    return _balanced(problem, chain, np.array(least_borders([squares] * problem.stages)))


def windows_of(problem: StageProblem) -> list[tuple[int, ...] | None]:
    """Spreads whose longer stages are one after the other, by the stage from which on; None where some stage would be
    empty."""
    stages, work = problem.stages, chain_of(problem).work
    each, more = divmod(round(float(work[-1]) / float(np.diff(work).max())), stages)
    longer = (np.arange(stages) - np.arange(stages)[:, None]) % stages < more
    wanted = np.cumsum(each + longer, axis=1)
    wanted = wanted * (work[-1] / np.maximum(wanted[:, -1:], 1))
    ends = np.searchsorted((work[1:] + work[:-1]) / 2, wanted)
    place = np.arange(1, stages + 1)
    ends = np.maximum.accumulate(np.maximum(ends, place) - place, axis=1) + place
    whole = (np.diff(ends, axis=1, prepend=0) > 0).all(axis=1) & (ends[:, -1] == len(work) - 1)
    return [tuple(row.tolist()) if all_there else None for row, all_there in zip(ends, whole, strict=True)]


def _balanced(problem: StageProblem, chain: Chain, borders: Ints) -> Ints:
    """Blocks of the rank with most work moved to the one with least, as long as that evens their work out."""
    owners = [problem.own(rank) for rank in range(problem.pp)]
    owned = np.zeros((problem.stages, problem.pp))
    for rank, own in enumerate(owners):
        owned[list(own), rank] = 1.0
    found = borders
    loads = _loads(chain, found[None], owned)[0]
    for _ in range(2 * problem.stages):
        most, fewest = owners[int(np.argmax(loads))], owners[int(np.argmin(loads))]
        near = moved(found, np.array([(giver, taker) for giver in most for taker in fewest]))
        if not len(near):
            break
        after = _loads(chain, near, owned)
        squares = np.square(after).sum(axis=1)
        best = int(np.argmin(squares))
        if squares[best] >= np.square(loads).sum() * (1 - 1e-9):
            break
        found, loads = near[best], after[best]
    return found


def moved(borders: Ints, pairs: Ints) -> Ints:
    """Borders by which the first stage of a pair has a block less and the second one a block more, no stage empty; a
    row for each pair that can."""
    low, high = pairs.min(axis=1)[:, None], pairs.max(axis=1)[:, None]
    between = (np.arange(len(borders)) >= low) & (np.arange(len(borders)) < high)
    found = borders + np.where(between, np.where(pairs[:, :1] < pairs[:, 1:], -1, 1), 0)
    return found[(np.diff(found, axis=1, prepend=0) > 0).all(axis=1)]


def _loads(chain: Chain, borders: Ints, owned: Floats) -> Floats:
    """Seconds of work of every rank, a row for each row of borders; ``owned``: which stages are whose."""
    ends = chain.work[borders]
    return np.asarray(np.diff(ends, axis=1, prepend=0.0) @ owned)
