"""The stage ILP: how many blocks of each run, under which candidate, sit in which pipeline stage (CP-SAT).

The model is a chain of runs of equal blocks. Integers ``n[s,r,c]``: blocks of run r in stage s under candidate c.
Write x[s,r] = sum_c n[s,r,c], e[s,r] = sum_{j<=s} x[j,r], w_s = sum n·seconds, a_s = sum n·after_s.

    (1) every block sits somewhere:       sum_s x[s,r] = blocks of r                                      `_place`
    (2) stages are contiguous:            d[s,r] -> e[s,r] = blocks of r;  not d[s,r] -> e[s,r+1] = 0     `_place`
    (3) no stage is empty:                sum_r x[s,r] >= 1                                               `_place`
    (4) each stage fits, with its own number of micro-batches in flight, min(p - s, m):                   `_fit`
            sum n·(resident + in_flight(s)·inflight) + t_s <= capacity - overhead,  t_s >= transient where n > 0
    (5) the step takes at least:          V >= sum_{j<s} w_j + transfers + m(w_s + waits) + a_s           `_time`
            which is `bounds.pipeline_bound` with the work after the last micro-batch of each stage

    minimise V; `run_balanced` then minimises (m-1) max_s w_s + sum_s w_s + max_s a_s at nearly the same V, because V
    alone leaves the stages that do not decide it open, and the simulator minds.

Seconds become integers, rounded down, so that the optimum times the unit stays a valid bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from ortools.sat.python import cp_model

RESOLUTION = 2**34


@dataclass(frozen=True, slots=True)
class Option:
    """One candidate for the blocks of a run, per block: ``seconds`` of forward and backward per micro-batch,
    ``after_s`` once per step when the stage has run its last micro-batch, and bytes as in `plan.Candidate`."""

    name: str
    seconds: float
    after_s: float
    resident: float
    inflight: float
    transient: float


@dataclass(frozen=True, slots=True)
class BlockRun:
    """``count`` consecutive equal blocks and what they may run under."""

    kind: str
    count: int
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class StageProblem:
    """Spread ``runs`` over ``stages`` stages of ``capacity`` bytes; ``overhead``: bytes per stage beside its blocks.

    ``transfer_s``: one transfer across a stage boundary.
    """

    runs: tuple[BlockRun, ...]
    stages: int
    micro_batches: int
    capacity: float
    transfer_s: float = 0.0
    overhead: tuple[float, ...] = ()

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose saved tensors stage ``stage`` holds at once under 1F1B."""
        return min(self.stages - stage, self.micro_batches)

    def spare(self, stage: int) -> float:
        """Bytes for the blocks of a stage."""
        return self.capacity - (self.overhead[stage] if self.overhead else 0.0)


@dataclass(frozen=True, slots=True)
class StageAnswer:
    """``counts[s][r][c]`` blocks; ``value``: the ILP's V for them; ``bound``: no spread has a lower V."""

    counts: tuple[tuple[tuple[int, ...], ...], ...]
    value: float
    bound: float
    status: str

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        """(stage, run, candidate, count) of every group of blocks, in chain order."""
        for s, stage in enumerate(self.counts):
            for r, run in enumerate(stage):
                for c, count in enumerate(run):
                    if count:
                        yield s, r, c, count


Counts = tuple[tuple[tuple[int, ...], ...], ...]
"""Blocks by stage, run and option."""


def _used(problem: StageProblem, stage: tuple[tuple[int, ...], ...]) -> Iterator[tuple[int, Option]]:
    for run, counts in zip(problem.runs, stage, strict=True):
        yield from zip(counts, run.options, strict=True)


def stage_seconds(problem: StageProblem, counts: Counts) -> float:
    """V of constraint (5) for given counts, in exact arithmetic."""
    last = problem.stages - 1
    value = before = 0.0
    for s, stage in enumerate(counts):
        items = list(_used(problem, stage))
        work = sum(n * o.seconds for n, o in items)
        after = sum(n * o.after_s for n, o in items)
        waits = problem.transfer_s * ((s > 0) + (s < last))
        passing = before + max(0, 2 * s - 1) * problem.transfer_s
        value = max(value, passing + problem.micro_batches * (work + waits) + after)
        before += work
    return value


def stage_bytes(problem: StageProblem, counts: Counts) -> list[float]:
    """Bytes of each stage as constraint (4) counts them, overhead included."""
    totals = []
    for s, stage in enumerate(counts):
        items = list(_used(problem, stage))
        held = sum(n * (o.resident + problem.in_flight(s) * o.inflight) for n, o in items)
        peak = max((o.transient for n, o in items if n), default=0.0)
        totals.append(held + peak + problem.capacity - problem.spare(s))
    return totals


def solve_stages(
    problem: StageProblem,
    work_limit: float = 4.0,
    balance: bool = True,
    gap: float = 1e-5,
    cutoff: float = float("inf"),
) -> StageAnswer | None:
    """The spread with the least V that fits, or None if none fits. Deterministic.

    ``gap``: how close to the optimum is enough (the bound stays valid). ``cutoff``: a V at which the answer is of no
    use; it is not balanced then. ``work_limit``: CP-SAT's deterministic time.
    """
    model = _Model(problem, gap)
    first = model.run(model.value, work_limit)
    if first is None:
        return None
    counts, bound, status = first
    bound = bound * model.unit
    if balance and problem.stages > 1 and bound < cutoff:
        # A tenth of a per mille of V buys the balance of every stage that V does not see.
        limit = int(max(stage_seconds(problem, counts) / model.unit, 1) * (1 + 1e-4)) + 1
        second = model.run_balanced(limit, counts, work_limit)
        counts = second or counts
    value = stage_seconds(problem, counts)
    return StageAnswer(counts, value, min(bound, value), status)


class _Model:
    def __init__(self, problem: StageProblem, gap: float) -> None:
        self.problem = problem
        self.gap = gap
        self.cp = cp_model.CpModel()
        m = problem.micro_batches
        most = sum(run.count * max((m + 1) * o.seconds + o.after_s for o in run.options) for run in problem.runs)
        self.unit = max(most + 4 * problem.stages * m * problem.transfer_s, 1e-12) / RESOLUTION
        self.n = [
            [[self.cp.new_int_var(0, run.count, "") for _ in run.options] for run in problem.runs]
            for _ in range(problem.stages)
        ]
        self.value = self.cp.new_int_var(0, 2 * RESOLUTION, "")
        self.work: list[Any] = []
        self.after: list[Any] = []
        self._place()
        self._fit()
        self._time()

    def _place(self) -> None:
        """Constraints (1), (2), (3)."""
        runs = self.problem.runs
        ends: list[Any] = [0] * len(runs)
        for stage in self.n:
            here = [sum(counts) for counts in stage]
            self.cp.add(sum(here) >= 1)
            ends = [end + count for end, count in zip(ends, here, strict=True)]
            for r in range(len(runs) - 1):
                done = self.cp.new_bool_var("")
                self.cp.add(ends[r] >= runs[r].count * done)
                self.cp.add(ends[r + 1] <= runs[r + 1].count * done)
        for end, run in zip(ends, runs, strict=True):
            self.cp.add(end == run.count)

    def _fit(self) -> None:
        """Constraint (4)."""
        problem = self.problem
        for s, stage in enumerate(self.n):
            flying = problem.in_flight(s)
            peaks = sorted({o.transient for run in problem.runs for o in run.options})
            peak: Any = _up(peaks[-1])
            if len(peaks) > 1:
                peak = self.cp.new_int_var(_up(peaks[0]), _up(peaks[-1]), "")
            terms: list[Any] = []
            for counts, run in zip(stage, problem.runs, strict=True):
                for count, option in zip(counts, run.options, strict=True):
                    terms.append(count * _up(option.resident + flying * option.inflight))
                    if len(peaks) > 1 and option.transient > peaks[0]:
                        used = self.cp.new_bool_var("")
                        self.cp.add(count <= run.count * used)
                        self.cp.add(peak >= _up(option.transient)).only_enforce_if(used)
            self.cp.add(sum(terms) + peak <= int(problem.spare(s)))

    def _time(self) -> None:
        """Constraint (5)."""
        problem, last = self.problem, self.problem.stages - 1
        transfer = int(problem.transfer_s / self.unit)
        before: Any = 0
        for s, stage in enumerate(self.n):
            pairs = [
                (count, option)
                for counts, run in zip(stage, problem.runs, strict=True)
                for count, option in zip(counts, run.options, strict=True)
            ]
            work = sum(count * int(option.seconds / self.unit) for count, option in pairs)
            after = sum(count * int(option.after_s / self.unit) for count, option in pairs)
            waits = transfer * ((s > 0) + (s < last))
            passing = before + max(0, 2 * s - 1) * transfer
            self.cp.add(self.value >= passing + problem.micro_batches * (work + waits) + after)
            self.work.append(work)
            self.after.append(after)
            before = before + work

    def run(self, objective: Any, work_limit: float) -> tuple[Counts, float, str] | None:
        self.cp.minimize(objective)
        solver = cp_model.CpSolver()
        solver.parameters.catch_sigint_signal = False  # Ctrl-C is Python's, as everywhere else
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 0
        solver.parameters.max_deterministic_time = work_limit
        # One stage is small: solved exactly, so that equal spreads come out in one order.
        solver.parameters.relative_gap_limit = self.gap if self.problem.stages > 1 else 0.0
        status = solver.solve(self.cp)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        counts = tuple(tuple(tuple(solver.value(v) for v in run) for run in stage) for stage in self.n)
        name = "optimal" if status == cp_model.OPTIMAL else "feasible"
        return counts, solver.best_objective_bound, name

    def run_balanced(self, limit: int, counts: Any, work_limit: float) -> Any:
        """The most even spread with V at most ``limit``."""
        self.cp.add(self.value <= limit)
        slowest = self.cp.new_int_var(0, RESOLUTION, "")
        longest = self.cp.new_int_var(0, RESOLUTION, "")
        for work, after in zip(self.work, self.after, strict=True):
            self.cp.add(slowest >= work)
            self.cp.add(longest >= after)
        for stage, values in zip(self.n, counts, strict=True):
            for variables, numbers in zip(stage, values, strict=True):
                for variable, number in zip(variables, numbers, strict=True):
                    self.cp.add_hint(variable, number)
        found = self.run((self.problem.micro_batches - 1) * slowest + sum(self.work) + longest, work_limit)
        return found[0] if found else None


def _up(nbytes: float) -> int:
    return ceil(nbytes)
