"""The stage ILP: how many blocks of each run, under which candidate, sit in which pipeline stage (CP-SAT).

The model is a chain of runs of equal blocks. Integers ``n[s,r,c]``: blocks of run r in stage s under candidate c.
Write x[s,r] = sum_c n[s,r,c], e[s,r] = sum_{j<=s} x[j,r]; f_s, b_s, i_s, a_s: sums over a stage of n times forward,
backward, what of a backward must run before the gradient goes on, and once after the last backward; o_q: over a rank,
the optimizer; S_q: the stages of rank q. Terms and proofs of (5) are those of `bounds`.

    (1) every block sits somewhere:       sum_s x[s,r] = blocks of r                                      `_place`
    (2) stages are contiguous:            d[s,r] -> e[s,r] = blocks of r;  not d[s,r] -> e[s,r+1] = 0     `_place`
    (3) no stage is empty:                sum_r x[s,r] >= 1, or the number that is fixed                  `_place`
    (4) each rank fits, at each of the times when most is in flight on its stages (`orders.peaks`):       `_fit`
            sum_{S_q} n·(resident + alive(s)·inflight + waiting(s)·waiting) + t_q <= capacity - overhead,
            t_q >= transient where n > 0
        and so does what waits on the host, with the most that is in flight on each of its stages at any time:
            sum_{S_q} n·(host + alive(s)·hosted) <= host_room
    (5) the step takes at least, for every rank q and with the largest o:                                 `_time`
            V >= sum_{j<q} f_j + q c + m sum_{S_q} (f_s + b_s) + waits + sum_{S_q} a_s + o
            V >= sum_{j<q} f_j + 2 q c + m sum_{S_q} (f_s + i_s) + waits + sum_{0<j<q} i_j + b_0 + a_0 + o
        and V >= sum f + sum_{s>0} i_s + b_0 + a_0 + 2 c crossings + o; for GPipe also
            V >= (m-1)(max f + max b) + sum (f + b) + o

    minimise V; `run_balanced` then minimises (m-1) max_q w_q + sum_s w_s + max_q a_q at nearly the same V, w_q and a_q
    being what a rank does each micro-batch and once, because V alone leaves the stages that do not decide it open, and
    the simulator minds. With several stages a rank it minimises m max_q w_q + m v max_s w_s + max_q a_q.

Seconds become integers, rounded down, so that the optimum times the unit stays a valid bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from autopar.schedule import SCHEDULES, stages_of
from autopar.solver.bounds import crossings_of, pipeline_bound, waits_of
from autopar.solver.orders import Held, peaks, warm_up
from autopar.solver.simulate import StageTimes
from autopar.solver.standing import Standing, standing

RESOLUTION = 2**30
"""Units of the largest possible V. More is not better: at 2^34 the presolve of CP-SAT 9.15 called a spread optimal that
was 7 % off (found by comparing with enumeration; a test holds the case)."""


ROUNDING_BYTES = 2.0**16
"""More than the rounding of all blocks' bytes adds up to."""


@dataclass(frozen=True, slots=True)
class Option:
    """One candidate for the blocks of a run, per block: seconds per micro-batch (``weight_s``: of the backward, what
    gives weight gradients alone), ``reduce_s`` once when the stage has run its last micro-batch, ``optimizer_s`` once
    when all have; bytes as in `plan.Candidate`, and ``waiting`` per micro-batch between the halves of a backward; of
    the host ``hosted`` per micro-batch in flight, and ``host`` all the time.
    Only in bounds: ``either_s``, seconds of the backward that may be forward as well; ``sure_input_s``,
    ``sure_weight_s``, those that are surely of one half of it; ``gradients``, bytes that are kept of a stage's
    backwards (`standing`)."""

    name: str
    forward_s: float
    backward_s: float
    resident: float
    inflight: float
    transient: float
    reduce_s: float = 0.0
    optimizer_s: float = 0.0
    weight_s: float = 0.0
    waiting: float = 0.0
    either_s: float = 0.0
    sure_input_s: float = 0.0
    sure_weight_s: float = 0.0
    hosted: float = 0.0
    host: float = 0.0
    gradients: float = 0.0


@dataclass(frozen=True, slots=True)
class BlockRun:
    """``count`` consecutive equal blocks and what they may run under."""

    kind: str
    count: int
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class StageProblem:
    """Spread ``runs`` over ``vpp`` stages on each of ``pp`` ranks of ``capacity`` bytes; ``overhead``: bytes per stage
    beside its blocks, ``host_room``: bytes that each rank has on the host. ``transfer_s``: one transfer between ranks.
    ``fixed``: blocks in each stage, or nothing.
    ``least``: for bounds, whose memory counts what ranks hold at some times (`standing`), not at every time; only then
    ``drains``, whether gradients that were reduced are held to the step's end; ``beside``, seconds of every stage
    beside its blocks (`beside.Beside`): in each forward, in each backward, more in its first forward and in its last
    backward; and ``ends_s``, seconds of the step before and after all stages."""

    runs: tuple[BlockRun, ...]
    pp: int
    micro_batches: int
    capacity: float
    transfer_s: float = 0.0
    overhead: tuple[float, ...] = ()
    schedule: str = "1f1b"
    vpp: int = 1
    fixed: tuple[int, ...] = ()
    least: bool = False
    beside: tuple[tuple[float, float, float, float], ...] = ()
    ends_s: float = 0.0
    host_room: float = float("inf")
    drains: bool = False

    @property
    def stages(self) -> int:
        return self.pp * self.vpp

    @property
    def halves(self) -> bool:
        """Whether the schedule halves backwards."""
        return SCHEDULES[self.schedule].splits_backward

    def beside_s(self) -> NDArray[np.float64]:
        """``beside`` by what it is of and by stage."""
        return np.array(self.beside).T if self.beside else np.zeros((4, self.stages))

    def own(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank."""
        return stages_of(self.schedule, self.pp, self.vpp)[rank]

    def held(self, rank: int) -> tuple[Held, ...]:
        """Micro-batches in flight on a rank's stages at the times when they are most."""
        schedule = self.schedule if self.pp > 1 else "none"
        if self.least:
            return (warm_up(schedule, self.pp, self.vpp, self.micro_batches)[rank],)
        return peaks(schedule, self.pp, self.vpp, self.micro_batches)[rank]

    def standing(self, rank: int) -> tuple[Standing, ...]:
        """What a rank surely holds at some times, for bounds."""
        schedule = self.schedule if self.pp > 1 else "none"
        return standing(schedule, self.pp, self.vpp, self.micro_batches, self.drains)[rank]

    def most_alive(self, rank: int) -> tuple[int, ...]:
        """The most micro-batches in flight on each stage of a rank at any time."""
        return tuple(max(alive for alive, _ in moments) for moments in zip(*self.held(rank), strict=True))

    def spare(self, rank: int) -> float:
        """Bytes for the blocks of a rank."""
        return self.capacity - (sum(self.overhead[stage] for stage in self.own(rank)) if self.overhead else 0.0)


@dataclass(frozen=True, slots=True)
class StageAnswer:
    """``counts[s][r][c]`` blocks; ``value``: the ILP's V for them; ``bound``: no spread has a lower V."""

    counts: tuple[tuple[tuple[int, ...], ...], ...]
    value: float
    bound: float
    status: str


Counts = tuple[tuple[tuple[int, ...], ...], ...]
"""Blocks by stage, run and option."""


def used(problem: StageProblem, stage: Sequence[Sequence[int]]) -> Iterator[tuple[int, Option]]:
    """The options of a stage, each with its number of blocks."""
    for run, counts in zip(problem.runs, stage, strict=True):
        yield from zip(counts, run.options, strict=True)


def stage_seconds(problem: StageProblem, counts: Counts) -> float:
    """V of constraint (5) for given counts, in exact arithmetic."""
    stages = []
    optimizer = [0.0] * problem.pp
    place = SCHEDULES[problem.schedule].rank_of
    for stage, here in enumerate(counts):
        items = list(used(problem, here))
        forward, backward, weight, after = (
            sum(n * getattr(o, name) for n, o in items) for name in ("forward_s", "backward_s", "weight_s", "reduce_s")
        )
        stages.append(StageTimes(forward, backward, weight, after_s=after))
        optimizer[place(stage, problem.pp)] += sum(n * o.optimizer_s for n, o in items)
    bound = pipeline_bound(stages, problem.micro_batches, problem.transfer_s, problem.schedule, problem.vpp)
    return bound + max(optimizer)


def rank_bytes(problem: StageProblem, counts: Counts) -> list[float]:
    """Bytes of each rank as constraint (4) counts them, overhead included."""
    totals = []
    for rank in range(problem.pp):
        own = problem.own(rank)
        items = {stage: list(used(problem, counts[stage])) for stage in own}
        held = max(
            sum(
                n * (o.resident + alive * o.inflight + waiting * o.waiting)
                for stage, (alive, waiting) in zip(own, held, strict=True)
                for n, o in items[stage]
            )
            for held in problem.held(rank)
        )
        peak = max((o.transient for pairs in items.values() for n, o in pairs if n), default=0.0)
        totals.append(held + peak + problem.capacity - problem.spare(rank))
    return totals


def solve_stages(
    problem: StageProblem,
    work_limit: float = 4.0,
    balance: bool = True,
    gap: float = 1e-5,
) -> StageAnswer | None:
    """The spread with the least V that fits, or None if none fits. Deterministic.

    ``gap``: how close to the optimum is enough (the bound stays valid). ``work_limit``: CP-SAT's deterministic time.
    """
    model = _Model(problem, gap)
    # With several stages a rank V only has to show what fits: the balance decides.
    several = balance and problem.vpp > 1
    first = model.run(model.value, work_limit / 8 if several else work_limit)
    if first is None and several:
        first = model.run(model.value, work_limit)
    if first is None:
        return None
    counts, bound, status = first
    bound = bound * model.unit
    if balance and problem.stages > 1:
        # A tenth of a per mille of V buys the balance of every stage that V does not see.
        limit = int(max(stage_seconds(problem, counts) / model.unit, 1) * (1 + 1e-4)) + 1
        second = model.run_balanced(limit, counts, work_limit / 4 if several else work_limit)
        counts = second or counts
    value = stage_seconds(problem, counts)
    return StageAnswer(counts, value, min(bound, value), status)


def least_seconds(problem: StageProblem, work_limit: float) -> float:
    """No spread has a lower V, and infinite if none fits; 0 where neither is known in CP-SAT's deterministic time."""
    # Bytes are rounded up block by block: room for that, so that nothing is called too large for a part of a byte.
    model = _Model(replace(problem, capacity=problem.capacity + ROUNDING_BYTES), 1e-5)
    found = model.run(model.value, work_limit)
    if found is None:
        return float("inf") if model.infeasible else 0.0
    return found[1] * model.unit


class _Model:
    def __init__(self, problem: StageProblem, gap: float) -> None:
        self.problem = problem
        self.gap = gap
        self.infeasible = False
        self.cp = cp_model.CpModel()
        m = problem.micro_batches
        most = sum(
            run.count * max((m + 1) * (o.forward_s + o.backward_s) + o.reduce_s + o.optimizer_s for o in run.options)
            for run in problem.runs
        )
        self.unit = max(most + 4 * problem.stages * m * problem.transfer_s, 1e-12) / RESOLUTION
        self.n = [
            [[self.cp.new_int_var(0, run.count, "") for _ in run.options] for run in problem.runs]
            for _ in range(problem.stages)
        ]
        self.value = self.cp.new_int_var(0, 2 * RESOLUTION, "")
        self.work: list[Any] = []
        self.after: list[Any] = []
        self.each: list[Any] = []
        self._place()
        self._fit()
        self._time()

    def _place(self) -> None:
        """Constraints (1), (2), (3)."""
        runs = self.problem.runs
        ends: list[Any] = [0] * len(runs)
        for s, stage in enumerate(self.n):
            here = [sum(counts) for counts in stage]
            fixed = self.problem.fixed
            self.cp.add(sum(here) == fixed[s] if fixed else sum(here) >= 1)
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
        peaks = sorted({o.transient for run in problem.runs for o in run.options})
        for rank in range(problem.pp):
            own = problem.own(rank)
            peak: Any = _up(peaks[-1])
            if len(peaks) > 1:
                peak = self.cp.new_int_var(_up(peaks[0]), _up(peaks[-1]), "")
                for stage in own:
                    for count, option, most in self._items(stage):
                        if option.transient > peaks[0]:
                            used = self.cp.new_bool_var("")
                            self.cp.add(count <= most * used)
                            self.cp.add(peak >= _up(option.transient)).only_enforce_if(used)
            for held in problem.held(rank):
                terms: list[Any] = [
                    count * _up(option.resident + alive * option.inflight + waiting * option.waiting)
                    for stage, (alive, waiting) in zip(own, held, strict=True)
                    for count, option, _ in self._items(stage)
                ]
                self.cp.add(sum(terms) + peak <= int(problem.spare(rank)))
            if problem.host_room < float("inf"):
                terms = [
                    count * _up(option.host + alive * option.hosted)
                    for stage, alive in zip(own, problem.most_alive(rank), strict=True)
                    for count, option, _ in self._items(stage)
                ]
                self.cp.add(sum(terms) <= int(problem.host_room))

    def _items(self, stage: int) -> Iterator[tuple[Any, Option, int]]:
        """Variables of a stage with their options, and the most they can be."""
        for counts, run in zip(self.n[stage], self.problem.runs, strict=True):
            for count, option in zip(counts, run.options, strict=True):
                yield count, option, run.count

    def _sum(self, stage: int, name: str) -> Any:
        """Units that a stage needs of one kind of seconds."""
        return sum(count * int(getattr(option, name) / self.unit) for count, option, _ in self._items(stage))

    def _time(self) -> None:
        """Constraint (5)."""
        problem, m = self.problem, self.problem.micro_batches
        transfer = int(problem.transfer_s / self.unit)
        forward, backward, once = (
            [self._sum(stage, name) for stage in range(problem.stages)]
            for name in ("forward_s", "backward_s", "reduce_s")
        )
        self.each = [ahead + back for ahead, back in zip(forward, backward, strict=True)]
        handing = backward
        if problem.halves:
            # Rounded down together, so that what is handed on is no more than the backward without its weights.
            handing = [self._handing(stage) if stage else 0 for stage in range(problem.stages)]
        shares = [sum(self._sum(stage, "optimizer_s") for stage in problem.own(q)) for q in range(problem.pp)]
        optimizer = self._largest(shares) if problem.pp > 1 else shares[0]
        there: Any = 0
        back: Any = 0
        for rank in range(problem.pp):
            own = problem.own(rank)
            ahead = sum(forward[stage] for stage in own)
            work = ahead + sum(backward[stage] for stage in own)
            after = sum(once[stage] for stage in own)
            arrival = there + (rank + waits_of(rank, problem.pp, m, problem.vpp)) * transfer
            self.cp.add(self.value >= arrival + m * work + after + optimizer)
            if rank:
                handed = m * (ahead + sum(handing[stage] for stage in own))
                way_back = rank * transfer + back + backward[0] + once[0]
                self.cp.add(self.value >= arrival + handed + way_back + optimizer)
                back = back + handing[rank]
            there = there + forward[rank]
            self.work.append(work)
            self.after.append(after + shares[rank])

        way_back = sum(handing[1:]) + backward[0] + once[0]
        crossings = crossings_of(problem.schedule, problem.pp, problem.vpp)
        self.cp.add(self.value >= sum(forward) + way_back + 2 * crossings * transfer + optimizer)
        if problem.schedule == "gpipe":
            slowest = [self._largest(seconds) for seconds in (forward, backward)]
            self.cp.add(self.value >= (m - 1) * sum(slowest) + sum(forward) + sum(backward) + optimizer)

    def _largest(self, values: list[Any]) -> Any:
        largest = self.cp.new_int_var(0, RESOLUTION, "")
        for value in values:
            self.cp.add(largest >= value)
        return largest

    def _handing(self, stage: int) -> Any:
        return sum(
            count * int((option.backward_s - option.weight_s) / self.unit) for count, option, _ in self._items(stage)
        )

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
        self.infeasible = status == cp_model.INFEASIBLE
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        counts = tuple(tuple(tuple(solver.value(v) for v in run) for run in stage) for stage in self.n)
        name = "optimal" if status == cp_model.OPTIMAL else "feasible"
        return counts, solver.best_objective_bound, name

    def run_balanced(self, limit: int, counts: Any, work_limit: float) -> Any:
        """The most even spread: with one stage a rank, of those with V at most ``limit``. With several, V sees what a
        rank does but not that ranks wait for each other at every stage, so that the slowest stage counts as well."""
        m, vpp = self.problem.micro_batches, self.problem.vpp
        slowest, longest = self._largest(self.work), self._largest(self.after)
        if vpp == 1:
            self.cp.add(self.value <= limit)
            objective = (m - 1) * slowest + sum(self.work) + longest
        else:
            objective = m * slowest + m * vpp * self._largest(self.each) + longest
        for stage, values in zip(self.n, counts, strict=True):
            for variables, numbers in zip(stage, values, strict=True):
                for variable, number in zip(variables, numbers, strict=True):
                    self.cp.add_hint(variable, number)
        found = self.run(objective, work_limit)
        return found[0] if found else None


def _up(nbytes: float) -> int:
    return ceil(nbytes)
