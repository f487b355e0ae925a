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
from functools import lru_cache
from math import ceil

import numpy as np

from autopar.solver.chain import Floats, Saving, fastest, savings, work_of
from autopar.solver.stages import BlockRun, Counts, StageProblem, used

Row = tuple[int, ...]
"""Blocks of every run in a stage."""

Allowed = tuple[int, ...]
"""Options of a run that its blocks may take, by place."""


def mixed(problem: StageProblem, borders: Sequence[int]) -> Counts | None:
    """Counts for stages that end at ``borders``; None where a rank does not fit, whatever the options."""
    rows = _rows(problem, borders)
    tables = _tables(problem.runs)
    found: dict[int, list[list[int]]] = {}
    for rank in range(problem.pp):
        own = problem.own(rank)
        best = _fastest(problem, tables, rank, [rows[stage] for stage in own])
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


def _fastest(problem: StageProblem, tables: _Tables, rank: int, rows: list[Row]) -> _Rank | None:
    """The blocks of a rank under the fastest options that were found to fit."""
    present = [r for r in range(len(problem.runs)) if any(row[r] for row in rows)]
    held = np.array(problem.held(rank), dtype=float)
    nbytes: dict[tuple[int, int], Floats] = {}
    best: _Rank | None = None
    for limit in sorted({o.transient for r in present for o in problem.runs[r].options}, reverse=True):
        allowed = {
            r: tuple(c for c, option in enumerate(problem.runs[r].options) if option.transient <= limit)
            for r in present
        }
        if not all(allowed.values()):
            break
        filled = _Rank(problem, tables, held, nbytes, allowed, problem.spare(rank) - limit, rows)
        if filled.fill() and (best is None or filled.seconds() < best.seconds() * (1 - 1e-12)):
            best = filled
        if filled.untouched:  # no limit makes blocks faster
            break
    return best


class _Tables:
    """What ranks share: of every run its options as arrays, their hulls and their bytes."""

    def __init__(self, runs: tuple[BlockRun, ...]) -> None:
        self.runs = runs
        self.work = [np.array([work_of(option) for option in run.options]) for run in runs]
        self.host = [[option.host for option in run.options] for run in runs]
        self.hosted = [[option.hosted for option in run.options] for run in runs]
        self._parts = [
            np.array([(option.resident, option.inflight, option.waiting) for option in run.options]).T for run in runs
        ]
        self._hulls: dict[tuple[int, Allowed, int], list[Saving]] = {}
        self._sorted: dict[tuple[int, Allowed], Allowed] = {}

    def fastest(self, run: int, allowed: Allowed) -> int:
        return self.by_work(run, allowed)[0]

    def by_work(self, run: int, allowed: Allowed) -> Allowed:
        """The options, the fastest first."""
        if (run, allowed) not in self._sorted:
            first = allowed[fastest(self._sub(run, allowed))]
            rest = sorted((c for c in allowed if c != first), key=lambda c: float(self.work[run][c]))
            self._sorted[run, allowed] = (first, *rest)
        return self._sorted[run, allowed]

    def hull(self, run: int, allowed: Allowed, alive: int) -> list[Saving]:
        """`savings`, in places of all options."""
        key = (run, allowed, alive)
        if key not in self._hulls:
            self._hulls[key] = [
                Saving(run, allowed[step.before], allowed[step.after], step.nbytes, step.seconds)
                for step in savings(self._sub(run, allowed), run, alive)
            ]
        return self._hulls[key]

    def nbytes(self, run: int, alive: Floats, waiting: Floats) -> Floats:
        """Bytes of a block under every option (a row each) at moments with so many micro-batches in flight."""
        resident, inflight, halves = self._parts[run]
        return np.asarray(resident[:, None] + np.outer(inflight, alive) + np.outer(halves, waiting))

    def _sub(self, run: int, allowed: Allowed) -> BlockRun:
        return BlockRun("", 1, tuple(self.runs[run].options[c] for c in allowed))


@lru_cache(maxsize=8)
def _tables(runs: tuple[BlockRun, ...]) -> _Tables:
    """A problem is asked for with more and less memory; its runs stay."""
    return _Tables(runs)


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
    host still has; ``most``: micro-batches in flight on each stage when they are most; ``untouched``: whether it fits
    with every block at its fastest."""

    def __init__(
        self,
        problem: StageProblem,
        tables: _Tables,
        held: Floats,
        nbytes: dict[tuple[int, int], Floats],
        allowed: dict[int, Allowed],
        room: float,
        rows: list[Row],
    ) -> None:
        self.problem, self.tables, self.allowed = problem, tables, allowed
        self.held, self._nbytes = held, nbytes
        self.blocks = [[[0] * len(run.options) for run in problem.runs] for _ in rows]
        self.lacks, self.host_left = np.full(len(self.held), -room), problem.host_room
        self.most = [int(alive) for alive in self.held[:, :, 0].max(axis=0)]
        for place, row in enumerate(rows):
            for r, count in enumerate(row):
                if count:
                    self._add(place, r, tables.fastest(r, allowed[r]), count)
        self.untouched = self._fits()

    def seconds(self) -> float:
        """Seconds per micro-batch of all blocks."""
        return sum(n * work_of(option) for stage in self.blocks for n, option in used(self.problem, stage))

    def fill(self) -> bool:
        """Change blocks until they fit; whether they do."""
        if self.untouched:
            return True
        self._fill()
        if self.lacks.max() > 0.0 and self.host_left < float("inf"):
            options = {r: tuple(c for c in some if not self.tables.hosted[r][c]) for r, some in self.allowed.items()}
            if all(options.values()):
                self.allowed = options
                self._fill()
        return self._fits()

    def _fits(self) -> bool:
        return bool(self.lacks.max() <= 0.0) and self.host_left >= 0.0

    def _fill(self) -> None:
        for change in self._changes():
            if self.lacks.max() <= 0.0:
                break
            count = self.blocks[change.place][change.run][change.before]
            if (more := self._more_hosted(change)) > 0.0:
                count = int(min(count, max(0.0, self.host_left) / more))
            if not count:
                continue
            nbytes = self._bytes(change.place, change.run)
            gains, lacking = nbytes[change.before] - nbytes[change.after], self.lacks > 0.0
            needed = count
            if (gains[lacking] > 0.0).all():
                needed = ceil((self.lacks[lacking] / gains[lacking]).max())
            if needed > count:
                self._move(change, count)
                continue
            self._move(change, needed - 1)
            self._move(self._cheapest(change), 1)

    def _changes(self) -> list[_Change]:
        """Along the hulls of every stage, the cheapest bytes first."""
        found = [
            _Change(place, r, step.before, step.after, step.seconds / step.nbytes)
            for place, stage in enumerate(self.blocks)
            for r, counts in enumerate(stage)
            if any(counts)
            for step in self.tables.hull(r, self.allowed[r], self.most[place])
        ]
        return sorted(found, key=lambda change: change.price)  # stable: a run's own steps keep their order

    def _cheapest(self, change: _Change) -> _Change:
        """The last block of a change, to the option with the fewest seconds that makes all fit."""
        nbytes = self._bytes(change.place, change.run)
        fits = (self.lacks + nbytes - nbytes[change.before] <= 0.0).all(axis=1)
        for after in self.tables.by_work(change.run, self.allowed[change.run]):
            to = _Change(change.place, change.run, change.before, after, 0.0)
            if fits[after] and self._more_hosted(to) <= max(0.0, self.host_left):
                return to
        return change

    def _more_hosted(self, change: _Change) -> float:
        """Bytes that a block of a change leaves on the host beyond what it does now."""
        hosted = self.tables.hosted[change.run]
        return self.most[change.place] * (hosted[change.after] - hosted[change.before])

    def _move(self, change: _Change, count: int) -> None:
        if count:
            self._add(change.place, change.run, change.before, -count)
            self._add(change.place, change.run, change.after, count)

    def _add(self, place: int, run: int, option: int, count: int) -> None:
        self.blocks[place][run][option] += count
        tables = self.tables
        self.host_left -= count * (tables.host[run][option] + self.most[place] * tables.hosted[run][option])
        self.lacks += count * self._bytes(place, run)[option]

    def _bytes(self, place: int, run: int) -> Floats:
        """Bytes of a block in a stage of the rank, a row for each option, at every moment."""
        if (place, run) not in self._nbytes:
            self._nbytes[place, run] = self.tables.nbytes(run, self.held[:, place, 0], self.held[:, place, 1])
        return self._nbytes[place, run]
