"""Stages of schedules with several stages a rank, where memory may be short: borders and options together.

Where every block may run under its fastest option, `fast_borders` are the borders. Else what a longer stage costs
depends on how much is in flight on it, so that spreads whose longer stages are one after the other are tried with the
options that fit, from one lap or another on, and then closer and closer around the best of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import ceil

from autopar.solver.borders import even_borders, fast_borders, length_of, windows_of
from autopar.solver.chain import fastest
from autopar.solver.mixes import mixed
from autopar.solver.stages import Counts, StageProblem

LAPS = 4
"""Laps that the longer stages are tried to begin with, at most."""

STEPS = (4, 2, 1)
"""By how many stages the longer ones are moved, the one after the other."""

BETTER = 1e-3
"""How much shorter than the best step of other blocks a step has to promise to be, to be looked into."""


@dataclass(slots=True)
class LapSpreads:
    """Spreads of one configuration in more and less memory, whatever its blocks may run under. ``borders``: the best
    when they were last looked for; ``begin``: from which stage on the longer ones were best then. ``share``: of the
    memory, what the best of all could be counted to take, and ``seconds``, what it took by its longest path."""

    borders: tuple[int, ...] = ()
    begin: int | None = None
    share: float = 0.0
    seconds: float = float("inf")
    _windows: list[tuple[int, ...] | None] = field(default_factory=list)

    def best(self, problem: StageProblem, anew: bool = True) -> Counts | None:
        """The shortest that was found to fit, where some may (`laps_fit`). ``anew``: whether other borders are looked
        for than those that are known, or even ones."""
        if not anew:
            borders = self.borders or even_borders(problem)
            counts = mixed(problem, borders)
            self.borders = borders if counts is not None else self.borders
            return counts
        fast = fast_borders(problem)
        first = mixed(problem, fast)
        if problem.fixed or (first is not None and at_ease(problem, first)):
            self.borders = fast
            return first
        spreads = {borders: mixed(problem, borders) for borders in (fast, even_borders(problem))}
        lengths = {borders: length_of(problem, counts) for borders, counts in spreads.items() if counts is not None}
        self._look_near(problem, spreads, lengths)
        if not lengths:
            return None
        self.borders = min(lengths, key=lambda borders: lengths[borders])
        return spreads[self.borders]

    def hopeless(self, problem: StageProblem) -> bool:
        """Whether blocks that may run under these options are not likely to do better than the best did."""
        if not self.share:
            return False
        counts = mixed(replace(problem, capacity=self.share * problem.capacity), self.borders)
        return counts is None or length_of(problem, counts) > (1 - BETTER) * self.seconds

    def keep(self, problem: StageProblem, counts: Counts, share: float) -> None:
        """Stages that fit, counted with such a share of the memory."""
        seconds = length_of(problem, counts)
        if seconds < self.seconds:
            self.share, self.seconds, self.borders = share, seconds, ends_of(counts)

    def _look_near(
        self,
        problem: StageProblem,
        spreads: dict[tuple[int, ...], Counts | None],
        lengths: dict[tuple[int, ...], float],
    ) -> None:
        self._windows = self._windows or windows_of(problem)

        def length(begin: int) -> float:
            borders = self._windows[begin]
            if borders is None:
                return float("inf")
            if borders not in spreads:
                counts = spreads[borders] = mixed(problem, borders)
                if counts is not None:
                    lengths[borders] = length_of(problem, counts)
            return lengths.get(borders, float("inf"))

        laps = range(0, problem.stages, problem.pp * ceil(problem.vpp / LAPS))
        begin = min(laps if self.begin is None else (self.begin, *laps), key=length)
        for step in STEPS if self.borders else ():
            while True:
                nearer = min(((begin + by) % problem.stages for by in (-step, step)), key=length)
                if length(nearer) >= length(begin):
                    break
                begin = nearer
        if length(begin) < float("inf"):
            self.begin = begin


def ends_of(counts: Counts) -> tuple[int, ...]:
    """Where the stages end."""
    return tuple(accumulate(sum(map(sum, stage)) for stage in counts))


def at_ease(problem: StageProblem, counts: Counts) -> bool:
    """Whether every block runs under its fastest option: memory forces nothing."""
    return all(
        not n or option == fastest(run)
        for stage in counts
        for run, some in zip(problem.runs, stage, strict=True)
        for option, n in enumerate(some)
    )
