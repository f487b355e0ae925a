"""The chain of blocks as arrays: what any piece of it takes at least, where memory may force slower candidates.

A piece is the blocks from a to b of the chain, on one stage of rank q. Blocks run under their fastest option unless
their bytes do not fit; what the piece then lacks is saved by changing blocks to other options at the best seconds per
byte, in parts of blocks (a fractional knapsack over the lower convex hulls of every run's options). Whole blocks never
save the same bytes in fewer seconds, so the seconds of a piece are a valid bound, and infinite only where nothing fits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from autopar.solver.stages import BlockRun, Option, StageProblem

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Saving:
    """Changing a block of run ``run`` from its option ``before`` to ``after`` saves ``nbytes`` for ``seconds`` a
    micro-batch."""

    run: int
    before: int
    after: int
    nbytes: float
    seconds: float


def work_of(option: Option) -> float:
    """Seconds per micro-batch."""
    return option.forward_s + option.backward_s


def bytes_of(option: Option, alive: int, kept: bool = False) -> float:
    """Bytes of a block while ``alive`` micro-batches are in flight, transient bytes left out. ``kept``: with those of
    its gradients, which are the same under every option of a run."""
    return option.resident + alive * option.inflight + (option.gradients if kept else 0.0)


def fastest(run: BlockRun) -> int:
    """The option with the fewest seconds; of equals the one with the fewest bytes."""
    options = run.options
    return min(range(len(options)), key=lambda c: (work_of(options[c]), options[c].inflight, options[c].resident))


def savings(run: BlockRun, index: int, alive: int) -> list[Saving]:
    """The lower convex hull of a run's options from its fastest on: ever fewer bytes, at ever more seconds a byte."""
    found: list[Saving] = []
    here = fastest(run)
    while True:
        now = run.options[here]
        best: Saving | None = None
        for other, option in enumerate(run.options):
            saved = bytes_of(now, alive) - bytes_of(option, alive)
            if saved <= 0.0:
                continue
            step = Saving(index, here, other, saved, max(0.0, work_of(option) - work_of(now)))
            if best is None or (step.seconds * best.nbytes, -step.nbytes) < (best.seconds * step.nbytes, -best.nbytes):
                best = step
        if best is None:
            return found
        found.append(best)
        here = best.after


def hull(problem: StageProblem, alive: int) -> list[Saving]:
    """The savings of all runs, cheapest bytes first; of one run in the order in which they build on each other."""
    steps = [(step, place) for r, run in enumerate(problem.runs) for place, step in enumerate(savings(run, r, alive))]
    steps.sort(key=lambda pair: (pair[0].seconds / pair[0].nbytes, pair[0].run, pair[1]))
    return [step for step, _ in steps]


def least_borders(costs: Iterable[Floats]) -> tuple[int, ...]:
    """Where stages end whose costs add up to least: ``costs``: for every stage, those of each piece from a to b; the
    first stage starts at 0, the last ends where the chain does (dynamic programming)."""
    total: Floats | None = None
    starts = []
    for cost in costs:
        if total is None:
            total = np.full(len(cost), np.inf)
            total[0] = 0.0
        sums = total[:, None] + cost
        starts.append(np.argmin(sums, axis=0))
        total = np.min(sums, axis=0)
    borders = [len(starts[-1]) - 1]
    for start in reversed(starts):
        borders.append(int(start[borders[-1]]))
    return tuple(borders[-2::-1])


def least_of_stages(values: Floats, stages: int) -> Floats:
    """For every stage, the least of the blocks it may have, of what each block of the chain has: stage j of S has none
    but the blocks j to N - S + j, and one of them at least."""
    return np.asarray(values[_blocks_of(len(values), stages)].min(axis=1))


@lru_cache(maxsize=256)
def _blocks_of(blocks: int, stages: int) -> NDArray[np.int64]:
    """The places of the blocks that each stage may have."""
    return np.arange(stages)[:, None] + np.arange(blocks - stages + 1)


class Chain:
    """Prefix sums over the chain of a problem, and the pieces between any two borders (matrices by a and b)."""

    def __init__(self, problem: StageProblem) -> None:
        self.problem = problem
        self.run_of = np.repeat(np.arange(len(problem.runs)), [run.count for run in problem.runs])
        self.blocks = len(self.run_of)
        first = [run.options[fastest(run)] for run in problem.runs]
        self.forward = self._sums([min(o.forward_s for o in run.options) for run in problem.runs])
        self.work = self._sums([work_of(option) for option in first])
        self.after = self._sums([min(o.reduce_s for o in run.options) for run in problem.runs])
        self.optimizer = self._sums([min(o.optimizer_s for o in run.options) for run in problem.runs])
        self.counts = np.stack([self._sums(row) for row in np.eye(len(problem.runs)).tolist()])
        self._transient = [min(o.transient for o in run.options) for run in problem.runs]
        self._hulls: dict[int, list[Saving]] = {}

    def _sums(self, values: list[float]) -> Floats:
        return np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float)[self.run_of])])

    def pieces(self, sums: Floats) -> Floats:
        """From prefix sums to the sum of every piece."""
        return sums[None, :] - sums[:, None]

    def hull(self, alive: int) -> list[Saving]:
        """See `hull`."""
        if alive not in self._hulls:
            self._hulls[alive] = hull(self.problem, alive)
        return self._hulls[alive]

    def seconds(self, rank: int) -> Floats:
        """Least seconds per micro-batch of every piece as the one stage of a rank; infinite where it cannot fit."""
        return np.asarray(np.max([self._seconds(rank, *time) for (time,) in self.problem.standing(rank)], axis=0))

    def _seconds(self, rank: int, alive: int, kept: bool) -> Floats:
        """The same at one time; ``kept``: with gradients."""
        problem = self.problem
        counts = [self.pieces(row) for row in self.counts]
        transient = np.zeros_like(counts[0])
        for count, needed in zip(counts, self._transient, strict=True):
            transient = np.maximum(transient, np.where(count > 0, needed, 0.0))
        options = [run.options[fastest(run)] for run in problem.runs]
        held = sum(count * bytes_of(option, alive, kept) for count, option in zip(counts, options, strict=True))
        lacking = np.asarray(held + transient - problem.spare(rank))
        found = self.pieces(self.work)
        if lacking.max() <= 0.0:
            return found
        for step in self.hull(alive):
            taken = np.clip(lacking, 0.0, counts[step.run] * step.nbytes)
            found = found + taken * (step.seconds / step.nbytes)
            lacking = lacking - taken
        # A part of a byte is rounding.
        return np.where(lacking > 1.0, np.inf, found)


@lru_cache(maxsize=8)
def chain_of(problem: StageProblem) -> Chain:
    """The arrays of a problem; the bounds of one problem share them."""
    return Chain(problem)
