"""Stages for a configuration: the chain of blocks, what each may run under, the stage ILP over compatible answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from autopar.schedule import SCHEDULES
from autopar.solver.answers import Answered
from autopar.solver.borders import even_borders
from autopar.solver.candidates import BlockCost
from autopar.solver.context import Context
from autopar.solver.evaluate import Assessment, Placed, assess, halves, placed, tied_elements
from autopar.solver.gathering import more_gathered, worth_gathering
from autopar.solver.groups import root_blocks
from autopar.solver.halves import Halves
from autopar.solver.lap_spread import LapSpreads, at_ease
from autopar.solver.laps import laps_fit
from autopar.solver.memory import BlockBytes
from autopar.solver.mixes import mixed
from autopar.solver.reach import reach
from autopar.solver.recompute import Recompute
from autopar.solver.space import Config
from autopar.solver.stages import BlockRun, Counts, Option, StageProblem, solve_stages

STAGE_GAP = 1e-3
"""How close to its optimum the stage ILP is solved; the simulator tells spreads apart afterwards."""

WORK = 0.5
"""Deterministic seconds that it may take."""

MOST_COUNTS = 512
"""Counts of blocks (stages times options) up to which it is asked for what quicker ways do not find: in more of them it
never found anything in its time (llama3-405b, 128 stages)."""

ROOM, HALVINGS = 1.64, 6
"""The largest share of the memory that stages may be counted to take, and how often the range is halved."""

CAPACITIES = (1.0, 0.98, 0.94, 0.88)
"""Shares of the memory for which borders are sought: whole blocks may not fit where parts of blocks would."""


@dataclass(frozen=True, slots=True)
class KindRun:
    """``count`` consecutive blocks from ``start`` of one kind and freedom. ``root``: their stage's root group holds
    them, or may (``sure`` False: only if a block they share a weight with is in the same stage). ``gathered``: whether
    their parameters may be freed (False), and stay gathered (True), under zero 3."""

    kind: str
    choices: tuple[str, ...]
    start: int
    count: int
    root: bool
    sure: bool
    gathered: tuple[bool, ...] = (False,)


def block_runs(context: Context, config: Config, extended: bool = False) -> list[KindRun]:
    """The chain of blocks as runs of alike ones. ``extended``: see `Context.freedom`."""
    blocks = context.model.blocks
    rooted = root_blocks(context.model, range(len(blocks)))
    # Where input and weight gradients are computed apart, a block would be recomputed for each (`capabilities.LIMITS`).
    whole = SCHEDULES[config.schedule].splits_backward
    alike = [
        (
            kind,
            _without_recomputation(choices) if whole else choices,
            root,
            config.pp == 1 or not (root and block.path),
            context.gathered_of(index) if config.zero == 3 and not root else (False,),
        )
        for index, ((kind, choices), root, block) in enumerate(
            zip(context.freedom(extended), rooted, blocks, strict=True)
        )
    ]
    runs, start = [], 0
    for (kind, choices, root, sure, gathered), group in groupby(alike):
        count = len(list(group))
        runs.append(KindRun(kind, choices, start, count, root, sure, gathered))
        start += count
    return runs


def _without_recomputation(choices: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in choices if Recompute.of(name).recompute == "none")


def compatible(answers: Sequence[Answered]) -> list[list[Answered]]:
    """Answers grouped by signature; blocks of one group can be mixed. Order kept."""
    groups: dict[tuple[str, ...], list[Answered]] = {}
    for answer in answers:
        groups.setdefault(answer.signature, []).append(answer)
    return list(groups.values())


def stage_problem(
    context: Context,
    config: Config,
    answers: Sequence[Answered],
    capacity: float | None = None,
    extended: bool = False,
    gathers: bool = True,
) -> tuple[StageProblem, list[list[BlockCost]]]:
    """The stage ILP of a configuration over compatible answers, and the cost each option stands for. ``extended``: see
    `Context.freedom`; ``gathers`` False: without blocks that stay gathered though they need not."""
    boundary = max(answer.boundary for answer in answers)
    place = placed(context, config, boundary)
    kinds = block_runs(context, config, extended)
    costs_of = [
        [
            replace(cost, gathered=True) if stays else cost
            for stays in (run.gathered if gathers else run.gathered[:1])
            for cost in _undominated([answer.costs[run.kind][choice] for answer in answers for choice in run.choices])
        ]
        for run in kinds
    ]
    most = [max(cost.trains for cost in costs) for costs in costs_of]
    largest = max(
        (cost.elements for costs, run in zip(costs_of, kinds, strict=True) if not run.root for cost in costs), default=0
    )
    ending = place.memory.root_reduction(_most_rooted(kinds, most, config.stages))
    runs = []
    for run, costs in zip(kinds, costs_of, strict=True):
        options = []
        for cost in costs:
            needed = max(place.memory.staging(_bytes_of(cost, run.root), largest), ending if run.root else 0.0)
            if not (run.root and run.sure):
                needed = max(needed, place.memory.staging(_bytes_of(cost, False), max(largest, cost.elements)))
            passes = context.model.kinds[run.kind].passes_gradient
            options.append(_option(place, cost, run.root, needed, halves(context, config, cost), passes))
        runs.append(BlockRun(run.kind, run.count, tuple(options)))
    overhead = overheads(place, config)
    host_room = context.cluster.device.host_memory_bytes or float("inf")
    if config.pp == 1:
        stage = [(costs[0], run.root) for costs, run in zip(costs_of, kinds, strict=True) for _ in range(run.count)]
        doubles = tied_elements(context, [[cost for cost, _ in stage]])[0][0]
        for (double, frozen), (_, root) in zip(doubles, stage, strict=True):
            overhead[0] -= place.memory.resident(double, root, frozen)
            host_room += place.memory.host_state(double, double - frozen)
    room = context.cluster.device.memory_bytes if capacity is None else capacity
    return replace(staged(context, config, place, runs, overhead, room), host_room=host_room), costs_of


def overheads(place: Placed, config: Config, least: bool = False) -> list[float]:
    """Bytes of each stage beside its blocks (``least``: those that are surely there when most is in flight); the
    reserve of a rank stands with its first stage."""
    memory = place.memory
    buffers = memory.least_buffers if least else memory.buffers
    return [float(buffers(s) + (memory.reserve if s < config.pp else 0)) for s in range(config.stages)]


def staged(
    context: Context,
    config: Config,
    place: Placed,
    runs: Sequence[BlockRun],
    overhead: Sequence[float],
    room: float,
    least: bool = False,
    beside: tuple[tuple[float, float, float, float], ...] = (),
) -> StageProblem:
    """The stage problem of a configuration over these runs; ``least``: for bounds, with `StageProblem.beside`."""
    return StageProblem(
        tuple(runs),
        config.pp,
        config.micro_batches,
        room,
        place.transfer_s(least),
        tuple(overhead),
        config.schedule,
        config.vpp,
        context.fix.stages,
        least,
        beside,
    )


def _bytes_of(cost: BlockCost, root: bool) -> BlockBytes:
    frozen, expert, gathered = cost.frozen, cost.expert, cost.gathered
    return BlockBytes(
        cost.elements, cost.inflight, cost.transient, root=root, frozen=frozen, expert=expert, gathered=gathered
    )


def _most_rooted(runs: Sequence[KindRun], elements: Sequence[int], stages: int) -> int:
    """The most elements that train of one stage's root group; ``elements``: of each run's largest block."""
    held = [run.count * n if run.root else 0 for run, n in zip(runs, elements, strict=True)]
    # The first block and the last are never in one stage of several.
    apart = min(elements[0], elements[-1]) if stages > 1 and runs[0].root and runs[-1].root else 0
    return sum(held) - apart


def _option(place: Placed, cost: BlockCost, root: bool, transient: float, halved: Halves, passes: bool) -> Option:
    """A block as the stage ILP counts it: alone, so that what hides its communication is its own computation.
    ``passes``: whether a gradient passes it."""
    data, elements, trains, expert = place.data, cost.elements, cost.trains, cost.expert
    copies, gather = (data.of(what, elements, expert) for what in ("gather_copy_s", "gather_s"))
    scatter, replicate = (data.of(what, trains, expert) for what in ("scatter_s", "replicate_s"))
    forward, backward, once = cost.forward_s, cost.backward_s + data.reduce_copy_s(trains), 0.0
    each = data.gathers_each and not cost.gathered
    if each:
        forward = forward + copies + gather if root else max(forward + copies, gather)
    elif data.ahead:
        once += copies
    else:
        once += copies + (gather if root else max(0.0, gather - forward - copies))
    # Nothing but the step's end waits for what drains.
    if data.exposes or (data.defers and root and not data.drains):
        once += scatter + replicate
    elif root and not data.defers:
        backward += scatter
        once += replicate
    elif not data.defers:
        backward = max(backward + copies, gather + scatter) if each and passes else max(backward, scatter)
    # What communication hides costs a little all the same, so that nothing is recomputed for nothing.
    own = 1e-6 * (cost.forward_s + cost.backward_s)
    return Option(
        name=f"{cost.kind}/{cost.choice}",
        forward_s=forward,
        backward_s=backward + own,
        resident=place.memory.resident(elements, root, cost.frozen, expert, cost.gathered),
        inflight=cost.inflight,
        transient=transient,
        reduce_s=once,
        optimizer_s=data.of("optimizer_s", trains, expert),
        weight_s=halved[0] + data.reduce_copy_s(trains),
        waiting=halved[1],
        hosted=cost.hosted,
        host=place.memory.host_state(elements, trains),
    )


def _undominated(costs: list[BlockCost]) -> list[BlockCost]:
    """Without those that another is no worse than in every entry (layouts are equal within a set)."""

    def entries(cost: BlockCost) -> tuple[float, ...]:
        return (cost.forward_s, cost.backward_s, cost.elements, cost.inflight, cost.transient, cost.hosted)

    kept: list[BlockCost] = []
    for cost in costs:
        if not any(all(a <= b for a, b in zip(entries(other), entries(cost), strict=True)) for other in kept):
            kept.append(cost)
    return kept


def best_stages(
    context: Context,
    config: Config,
    answers: Sequence[Answered],
    extended: bool = False,
    thorough: bool = True,
    at_once: bool = False,
    beat: float = float("inf"),
    laps: LapSpreads | None = None,
) -> Assessment | None:
    """The fastest stages found that fit, over compatible answers; None if none fit, or what waits on the host does not
    fit there. ``extended``: see `Context.freedom`; ``thorough``: see `quick_stages`; ``at_once``: the first that are
    found, and no others. ``beat``: seconds sought that others are not looked for if they are not likely to beat.
    ``laps``: what other answers' stages are known to take; those that do not promise less are not looked for.

    The stage problem counts each part of a rank's bytes at its most, as if all came at once. Where it finds memory
    short, more room than there is is tried as well; what counts is whether the bytes of `assess` fit. Which blocks stay
    gathered under zero 3, where that may be worth it, is a choice of the problem itself, and then, with none of it in
    the problem, what room the stages leave (`more_gathered`)."""
    boundary = max(answer.boundary for answer in answers)
    tried: dict[Counts, Assessment | None] = {}
    laps = laps or LapSpreads()

    def fitting(
        problem: StageProblem, costs_of: list[list[BlockCost]], share: float, anew: bool = True
    ) -> tuple[Counts | None, Assessment | None]:
        """The stages for a share of the memory, and what they take if they fit. ``anew``: see `LapSpreads`."""
        begin = time.perf_counter()
        smaller = replace(problem, capacity=share * problem.capacity)
        counts = quick_stages(smaller, thorough and not at_once and share == 1.0, laps, anew)
        context.clock.add("stages", begin)
        if counts is None:
            return None, None
        if counts not in tried:
            found = assess(context, config, spread(counts, costs_of), boundary, fitting=True)
            tried[counts] = found if found.step_time < float("inf") else None
            if config.vpp > 1 and tried[counts] is not None:
                laps.keep(problem, counts, share)
        return counts, tried[counts]

    others: list[Assessment | None] = []
    spared = worth_gathering(context, config, answers[0])
    if spared:
        problem, costs_of = stage_problem(context, config, answers, extended=extended)
        counts, best = fitting(problem, costs_of, 1.0)
        if at_once or (counts is not None and best is not None and at_ease(problem, counts)):
            return best
        others, tried = [best], {}
    problem, costs_of = stage_problem(context, config, answers, extended=extended, gathers=False)
    hopeless = laps.hopeless(problem)
    counts, best = (None, None) if hopeless else fitting(problem, costs_of, 1.0)
    if at_once:
        return best
    if not hopeless and (counts is None or best is None or not at_ease(problem, counts)):
        # Between most that fits and least that does not, closer and closer.
        fits, not_fits = 1.0, ROOM
        for _ in range(HALVINGS):
            share = (fits + not_fits) / 2
            found = fitting(problem, costs_of, share, anew=False)[1]
            if found is None:
                not_fits = share
                continue
            fits = share
            if best is None or found.sought_s < best.sought_s:
                best = found
        if config.vpp > 1 and best is not None:
            found = fitting(problem, costs_of, fits)[1]
            best = found if found is not None and found.sought_s < best.sought_s else best
    if not others:
        return best
    chosen: Assessment | None = None
    for one in sorted((one for one in (best, *others) if one is not None), key=lambda one: one.sought_s):
        likely = one.sought_s * (1 - spared) < min(beat, chosen.sought_s if chosen else beat)
        one = more_gathered(context, one) if likely else one
        chosen = one if chosen is None or one.sought_s < chosen.sought_s else chosen
    return chosen


def quick_stages(
    problem: StageProblem, thorough: bool = True, laps: LapSpreads | None = None, anew: bool = True
) -> Counts | None:
    """Stages that fit and load ranks evenly, or None: borders by `reach` (one stage a rank) or `lap_spread` (several;
    ``laps``: what is known of the same problem in other memory), the options of blocks by `mixes`; if ``thorough``, and
    the problem is not too large, the ILP where these find nothing that fits though there may be something."""
    if problem.stages == 1:  # small, and solved exactly, once
        answer = solve_stages(problem, work_limit=WORK if thorough else WORK / 10, gap=0.0 if thorough else STAGE_GAP)
        return answer.counts if answer else None
    if problem.vpp > 1 and not laps_fit(problem):
        return None
    if problem.vpp > 1:
        counts = (laps or LapSpreads()).best(problem, anew)
        if counts is not None:
            return counts
    for share in CAPACITIES if problem.vpp == 1 else ():
        borders = likely_borders(replace(problem, capacity=share * problem.capacity))
        if borders is None and share == 1.0:
            return None
        counts = mixed(problem, borders) if borders else None
        if counts is not None:
            return counts
    if not thorough or problem.stages * sum(len(run.options) for run in problem.runs) > MOST_COUNTS:
        return None
    answer = solve_stages(problem, work_limit=WORK, balance=False, gap=STAGE_GAP)
    return answer.counts if answer else None


def likely_borders(problem: StageProblem) -> tuple[int, ...] | None:
    """Where stages end that load ranks evenly; None where one stage a rank fits nowhere."""
    if problem.vpp > 1:
        return even_borders(problem)
    reached = reach(problem)
    return reached.borders if reached else None


def spread(counts: Counts, costs_of: list[list[BlockCost]]) -> list[list[BlockCost]]:
    """Block costs per stage, in chain order."""
    return [
        [
            cost
            for run, costs in zip(stage, costs_of, strict=True)
            for n, cost in zip(run, costs, strict=True)
            for _ in range(n)
        ]
        for stage in counts
    ]
