"""Which options the blocks of given stages run under: the fewest seconds that fit, rank by rank.

Ranks are independent once the borders stand. A rank starts with every block at its fastest and changes blocks along the
hull of their options (`chain.savings`), the cheapest bytes first and the stage with most in flight first, until it fits
at every moment when most is in flight; the last block changes to the cheapest option that will do. Where the host is
full before that, the blocks left change along the hull of the options that leave nothing there. Done once for every
limit that transients may be held to; the fastest is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from autopar.solver.chain import bytes_of, fastest, savings, work_of
from autopar.solver.orders import Held
from autopar.solver.stages import BlockRun, Counts, Option, StageProblem, used

Row = tuple[int, ...]
"""Blocks of every run in a stage."""


def mixed(problem: StageProblem, borders: Sequence[int]) -> Counts | None:
    """Counts for stages that end at ``borders``; None where a rank does not fit, whatever the options."""
    rows = _rows(problem, borders)
    found: dict[int, list[list[int]]] = {}
    for rank in range(problem.pp):
        own = problem.own(rank)
        best = _fastest(problem, rank, [rows[stage] for stage in own])
        if best is None:
            return None
        found |= dict(zip(own, best.blocks, strict=True))
    return tuple(tuple(map(tuple, found[stage])) for stage in range(problem.stages))


def _rows(problem: StageProblem, borders: Sequence[int]) -> list[Row]:
    ends = [0]
    for run in problem.runs:
        ends.append(ends[-1] + run.count)
    return [
        tuple(max(0, min(end, ends[r + 1]) - max(start, ends[r])) for r in range(len(problem.runs)))
        for start, end in zip((0, *borders), borders, strict=False)
    ]


def _fastest(problem: StageProblem, rank: int, rows: list[Row]) -> _Rank | None:
    """The blocks of a rank under the fastest options that were found to fit."""
    present = [r for r in range(len(problem.runs)) if any(row[r] for row in rows)]
    best: _Rank | None = None
    for limit in sorted({o.transient for r in present for o in problem.runs[r].options}, reverse=True):
        allowed = {
            r: [c for c, option in enumerate(problem.runs[r].options) if option.transient <= limit] for r in present
        }
        if not all(allowed.values()):
            break
        filled = _Rank(problem, allowed, problem.held(rank), problem.spare(rank) - limit, rows)
        if filled.fill() and (best is None or filled.seconds() < best.seconds() * (1 - 1e-12)):
            best = filled
    return best


@dataclass(frozen=True, slots=True)
class _Change:
    """Blocks of run ``run`` in stage ``place`` of the rank go from one option to another."""

    place: int
    run: int
    before: int
    after: int
    price: float


class _Rank:
    """One rank: ``blocks[place][run][option]``; ``lacks``: bytes it lacks at every moment; ``host_left``: bytes its
    host still has; ``most``: micro-batches in flight on each stage when they are most."""

    def __init__(
        self, problem: StageProblem, allowed: dict[int, list[int]], held: Sequence[Held], room: float, rows: list[Row]
    ) -> None:
        self.problem, self.runs, self.allowed, self.held = problem, problem.runs, allowed, held
        self.blocks = [[[0] * len(run.options) for run in problem.runs] for _ in rows]
        self.lacks, self.host_left = [-room] * len(held), problem.host_room
        self.most = [max(moment[place][0] for moment in held) for place in range(len(rows))]
        for place, row in enumerate(rows):
            for r, count in enumerate(row):
                if count:
                    self._add(place, r, self._allowed(r, fastest(self._sub(r))), count)

    def seconds(self) -> float:
        """Seconds per micro-batch of all blocks."""
        return sum(n * work_of(option) for stage in self.blocks for n, option in used(self.problem, stage))

    def fill(self) -> bool:
        """Change blocks until they fit; whether they do."""
        self._fill()
        if max(self.lacks) > 0.0 and self.host_left < float("inf"):
            options = {r: [c for c in some if not self.runs[r].options[c].hosted] for r, some in self.allowed.items()}
            if all(options.values()):
                self.allowed = options
                self._fill()
        return max(self.lacks) <= 0.0 and self.host_left >= 0.0

    def _fill(self) -> None:
        for change in self._changes():
            if max(self.lacks) <= 0.0:
                break
            count = self.blocks[change.place][change.run][change.before]
            if (more := self._more_hosted(change)) > 0.0:
                count = int(min(count, max(0.0, self.host_left) / more))
            gains = [-more for more in self._difference(change.place, change.run, change.before, change.after)]
            needed = count
            if all(gain > 0.0 or lack <= 0.0 for lack, gain in zip(self.lacks, gains, strict=True)):
                needed = max(ceil(lack / gain) for lack, gain in zip(self.lacks, gains, strict=True) if lack > 0.0)
            if needed > count:
                self._move(change, count)
                continue
            if count:
                self._move(change, needed - 1)
                self._move(self._cheapest(change), 1)

    def _changes(self) -> list[_Change]:
        """Along the hulls of every stage, the cheapest bytes first."""
        found = []
        for place, stage in enumerate(self.blocks):
            alive = self.most[place]
            for r, counts in enumerate(stage):
                for step in savings(self._sub(r), r, alive) if any(counts) else ():
                    before, after = self._allowed(r, step.before), self._allowed(r, step.after)
                    found.append(_Change(place, r, before, after, step.seconds / step.nbytes))
        return sorted(found, key=lambda change: change.price)  # stable: a run's own steps keep their order

    def _cheapest(self, change: _Change) -> _Change:
        """The last block of a change, to the option with the fewest seconds that makes all fit."""
        run = self.runs[change.run]
        for after in sorted(self.allowed[change.run], key=lambda c: work_of(run.options[c])):
            more = self._difference(change.place, change.run, change.before, after)
            to = _Change(change.place, change.run, change.before, after, 0.0)
            fits = all(lack + one <= 0.0 for lack, one in zip(self.lacks, more, strict=True))
            if fits and self._more_hosted(to) <= max(0.0, self.host_left):
                return to
        return change

    def _more_hosted(self, change: _Change) -> float:
        """Bytes that a block of a change leaves on the host beyond what it does now."""
        options = self.runs[change.run].options
        return self.most[change.place] * (options[change.after].hosted - options[change.before].hosted)

    def _move(self, change: _Change, count: int) -> None:
        if count:
            self._add(change.place, change.run, change.before, -count)
            self._add(change.place, change.run, change.after, count)

    def _add(self, place: int, run: int, option: int, count: int) -> None:
        self.blocks[place][run][option] += count
        chosen = self.runs[run].options[option]
        self.host_left -= count * (chosen.host + self.most[place] * chosen.hosted)
        for index, one in enumerate(self._bytes(place, self.runs[run].options[option])):
            self.lacks[index] += count * one

    def _difference(self, place: int, run: int, before: int, after: int) -> list[float]:
        options = self.runs[run].options
        pairs = zip(self._bytes(place, options[after]), self._bytes(place, options[before]), strict=True)
        return [new - old for new, old in pairs]

    def _bytes(self, place: int, option: Option) -> list[float]:
        """Bytes of a block in a stage of the rank at every moment."""
        return [bytes_of(option, moment[place][0]) + moment[place][1] * option.waiting for moment in self.held]

    def _sub(self, run: int) -> BlockRun:
        return BlockRun("", 1, tuple(self.runs[run].options[c] for c in self.allowed[run]))

    def _allowed(self, run: int, index: int) -> int:
        return self.allowed[run][index]
