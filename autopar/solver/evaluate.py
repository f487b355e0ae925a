"""From a configuration and block costs to stages, seconds and bytes: what a plan is predicted to take.

`assess` prices given stages; `best_stages` finds them by the stage ILP over the candidates of one set of compatible
answers; `stage_bound` runs the same ILP over what no decision can undercut, a valid bound for the configuration.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

from autopar.solver.bounds import spread_bound
from autopar.solver.candidates import RECOMPUTE, BlockCost
from autopar.solver.data_axis import BlockTime, DataAxis, DataTimes
from autopar.solver.memory import BlockBytes, MemoryModel
from autopar.solver.shardings import Answered, Context, Shardings
from autopar.solver.simulate import StageTimes, simulate
from autopar.solver.space import Config
from autopar.solver.stages import BlockRun, Option, StageAnswer, StageProblem, solve_stages

STAGE_GAP = 1e-4
"""How close to its optimum the stage ILP is solved; the simulator tells spreads apart afterwards."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """Stages of block costs with their seconds, bytes and the step time of the whole."""

    config: Config
    stages: tuple[tuple[BlockCost, ...], ...]
    times: tuple[DataTimes, ...]
    memory: tuple[dict[str, int], ...]
    step_time: float
    breakdown: dict[str, float]


@dataclass(frozen=True, slots=True)
class Placed:
    """What a configuration's prices depend on."""

    data: DataAxis
    memory: MemoryModel
    transfer_s: float


def placed(context: Context, config: Config, boundary: int) -> Placed:
    """The data axis, memory and stage links of a configuration whose stages hand on ``boundary`` local bytes."""
    data = DataAxis(
        context.ops, context.collectives, config.dp, config.tp, config.zero, config.pp > 1, config.micro_batches
    )
    reserve = context.cluster.device.reserve_bytes
    memory = MemoryModel(context.job, config.dp, config.zero, config.pp, config.micro_batches, boundary, reserve)
    transfer = context.collectives.seconds("send_recv", boundary, config.pp, config.dp * config.tp)
    return Placed(data, memory, transfer)


def tied_elements(context: Context, stages: Sequence[Sequence[BlockCost]]) -> tuple[list[list[int]], int]:
    """Per stage and block, parameter elements that an earlier block of the stage holds already; and the most elements
    whose gradients stages must add up, because several hold a copy."""
    shared: list[list[int]] = []
    holders: dict[str, int] = {}
    crossing = 0
    for costs in stages:
        seen: set[str] = set()
        row = []
        for cost in costs:
            duplicate = 0
            graph = context.model.kinds[cost.kind].graph
            for node in graph.of("parameter"):
                tie = context.ties.parameters.get((cost.kind, node.name))
                if tie is None:
                    continue
                layout = cost.decision.inputs[node.name]
                ways = prod(cost.decision.axes[axis] for axis, kind in layout.types if kind.kind == "S")
                elements = prod(node.meta.at(1, 1)) // ways
                if tie in seen:
                    duplicate += elements
                elif tie in holders:
                    crossing += elements
                seen.add(tie)
                holders[tie] = 1
            row.append(duplicate)
        shared.append(row)
    return shared, crossing


def assess(context: Context, config: Config, stages: Sequence[Sequence[BlockCost]], boundary: int) -> Assessment:
    """Price and simulate a plan's stages."""
    begin = time.perf_counter()
    place = placed(context, config, boundary)
    shared, crossing = tied_elements(context, stages)
    times = tuple(
        place.data.stage(
            [
                BlockTime(cost.forward_s, cost.backward_s, cost.elements - double)
                for cost, double in zip(costs, doubles, strict=True)
            ]
        )
        for costs, doubles in zip(stages, shared, strict=True)
    )
    memory = tuple(
        place.memory.stage(
            index,
            [
                BlockBytes(cost.elements, cost.inflight, cost.transient, double)
                for cost, double in zip(costs, doubles, strict=True)
            ],
        )
        for index, (costs, doubles) in enumerate(zip(stages, shared, strict=True))
    )
    exchanged = crossing * context.job.master_bytes / place.memory.shards
    tied_s = context.collectives.seconds("send_recv", exchanged, config.pp, config.dp * config.tp)
    step_time, breakdown = step(times, stages, config, place.transfer_s, tied_s)
    context.clock.add("simulation", begin)
    context.clock.counts["simulations"] += 1
    return Assessment(config, tuple(map(tuple, stages)), times, memory, step_time, breakdown)


def step(
    times: Sequence[DataTimes], stages: Sequence[Sequence[BlockCost]], config: Config, transfer_s: float, tied_s: float
) -> tuple[float, dict[str, float]]:
    """Step time, and where it goes on the stage that decides it (seconds that add up to the step time).

    The optimizer starts everywhere at once: clipping needs every stage's gradients.
    """
    m = config.micro_batches
    events = [StageTimes(t.forward_s, t.backward_s, t.first_s, t.last_s, t.reduce_s) for t in times]
    timeline = simulate(events, m, (transfer_s,) * (config.pp - 1))
    optimizer = max(t.optimizer_s for t in times)
    total = timeline.total + tied_s + optimizer
    last = max(range(len(times)), key=lambda s: (timeline.ends[s] + times[s].reduce_s, -s))
    t, blocks = times[last], stages[last]
    again = sum(block.again_s for block in blocks)
    talk = sum(block.communication_s for block in blocks)
    own = sum(block.forward_s + block.backward_s for block in blocks)
    busy = m * (t.forward_s + t.backward_s) + t.first_s + t.last_s
    return total, {
        "computation": m * (own - again - talk),
        "recomputation": m * again,
        "model axis communication": m * talk,
        "data axis": busy - m * own + t.reduce_s,
        "pipeline wait": timeline.ends[last] - busy if len(times) > 1 else 0.0,
        "tied weights": tied_s,
        "optimizer": optimizer,
    }


def block_runs(context: Context) -> list[tuple[str, tuple[str, ...], int]]:
    """Consecutive blocks of one kind with the same freedom: (kind, recompute choices, count)."""
    return [(kind, choices, len(list(group))) for (kind, choices), group in groupby(context.freedom())]


def compatible(answers: Sequence[Answered]) -> list[list[Answered]]:
    """Answers grouped by signature; blocks of one group can be mixed. Order kept."""
    groups: dict[tuple[str, ...], list[Answered]] = {}
    for answer in answers:
        groups.setdefault(answer.signature, []).append(answer)
    return list(groups.values())


def stage_problem(
    context: Context, config: Config, answers: Sequence[Answered], capacity: float | None = None
) -> tuple[StageProblem, list[list[BlockCost]]]:
    """The stage ILP of a configuration over compatible answers, and the cost each option stands for."""
    boundary = max(answer.boundary for answer in answers)
    place = placed(context, config, boundary)
    runs, costs_of = [], []
    for kind, choices, count in block_runs(context):
        costs = [answer.costs[kind][RECOMPUTE.index(choice)] for answer in answers for choice in choices]
        costs = _undominated(costs)
        costs_of.append(costs)
        runs.append(BlockRun(kind, count, tuple(_option(place, cost) for cost in costs)))
    overhead = [float(place.memory.buffers(s) + place.memory.reserve) for s in range(config.pp)]
    if config.pp == 1:
        stage = [
            cost for costs, run in zip(costs_of, runs, strict=True) for cost in costs[:1] for _ in range(run.count)
        ]
        doubles = sum(tied_elements(context, [stage])[0][0])
        overhead[0] -= place.memory.resident(doubles)
    room = context.cluster.device.memory_bytes if capacity is None else capacity
    problem = StageProblem(tuple(runs), config.pp, config.micro_batches, room, place.transfer_s, tuple(overhead))
    return problem, costs_of


def _option(place: Placed, cost: BlockCost) -> Option:
    data, elements = place.data, cost.elements
    forward = cost.forward_s
    backward = cost.backward_s + data.reduce_copy_s(elements)
    after = 0.0
    if data.pipelined:
        after = data.reduce_s(elements)
        if data.sharded:
            backward = max(backward + data.gather_copy_s(elements), data.gather_s(elements))
    else:
        copies = data.gather_copy_s(elements)
        gather = data.gather_s(elements)
        forward = max(forward + copies, gather)
        if data.sharded:
            backward = max(backward + copies, gather + data.reduce_s(elements))
    share = elements / place.memory.shards
    after += data.ops.optimizer_seconds(int(share)) + data.ops.clip_seconds(int(share))
    # What communication hides costs a little all the same, so that nothing is recomputed for nothing.
    own = 1e-6 * (cost.forward_s + cost.backward_s)
    return Option(
        name=f"{cost.kind}/{cost.recompute}",
        seconds=forward + backward + own,
        after_s=after,
        resident=place.memory.resident(elements),
        inflight=cost.inflight,
        transient=cost.transient + place.memory.staging(elements),
    )


def _undominated(costs: list[BlockCost]) -> list[BlockCost]:
    """Without those that another is no worse than in every entry (layouts are equal within a set)."""

    def entries(cost: BlockCost) -> tuple[float, ...]:
        return (cost.forward_s, cost.backward_s, cost.elements, cost.inflight, cost.transient)

    kept: list[BlockCost] = []
    for cost in costs:
        if not any(all(a <= b for a, b in zip(entries(other), entries(cost), strict=True)) for other in kept):
            kept.append(cost)
    return kept


def best_stages(
    context: Context, config: Config, answers: Sequence[Answered], cutoff: float = float("inf")
) -> Assessment | None:
    """The fastest stages that fit, over compatible answers; None if none fit. ``cutoff``: a step time that is of no use
    any more; stages that cannot be faster are found less carefully."""
    begin = time.perf_counter()
    problem, costs_of = stage_problem(context, config, answers)
    # The ILP's V counts what blocks hide of each other's communication a little too high.
    answer = solve_stages(problem, gap=STAGE_GAP, cutoff=cutoff * 1.02)
    context.clock.add("stage ILP", begin)
    context.clock.counts["stage ILPs"] += 1
    if answer is None:
        return None
    return assess(context, config, spread(answer, costs_of, config.pp), max(a.boundary for a in answers))


def spread(answer: StageAnswer, costs_of: list[list[BlockCost]], stages: int) -> list[list[BlockCost]]:
    """Block costs per stage, in chain order."""
    found: list[list[BlockCost]] = [[] for _ in range(stages)]
    for stage, run, option, count in answer.runs():
        found[stage] += [costs_of[run][option]] * count
    return found


def quick_bound(context: Context, config: Config, work: float) -> float:
    """No plan of this configuration takes less, given that a micro-batch's blocks take at least ``work`` seconds."""
    place = placed(context, config, 0)
    m = config.micro_batches
    total = sum(prod(meta.at(1, 1)) for meta in context.model.parameters.values())
    work += place.data.least_copies_s(total / config.tp)
    # Some stage holds at least its even share.
    share = int(total / config.tp / config.pp / place.memory.shards)
    optimizer = context.ops.optimizer_seconds(share) + context.ops.clip_seconds(share)
    each, once = _least_exposed(context, config, place.data)
    if config.pp == 1:
        return max(m * (work + each) + once, _least_communication(context, config, place.data)) + optimizer
    return spread_bound(work, config.pp, m) + optimizer


def _least_elements(context: Context, config: Config, index: int) -> int:
    """Parameter elements of block ``index`` per rank when all of them are split. Of a tied parameter the first block
    counts, and the last, if it surely sits in another stage."""
    blocks = context.model.blocks
    block = blocks[index]
    apart = config.pp > 1 and index == len(blocks) - 1
    total = 0
    for node in context.model.kinds[block.kind].graph.of("parameter"):
        tie = context.ties.parameters.get((block.kind, node.name))
        first = next((i for i, other in enumerate(blocks) if _holds(context, other.kind, tie)), index) if tie else index
        if first == index or (apart and first == 0):
            total += prod(node.meta.at(1, 1))
    return total // config.tp


def _holds(context: Context, kind: str, tie: str | None) -> bool:
    return any(owner == kind and name == tie for (owner, _), name in context.ties.parameters.items())


def _least_exposed(context: Context, config: Config, data: DataAxis) -> tuple[float, float]:
    """Network seconds that nothing can hide without stages, (each micro-batch, once a step): the first gather each way
    and the last reduction."""
    if config.pp > 1:
        return 0.0, 0.0
    first, last = (_least_elements(context, config, index) for index in (0, len(context.model.blocks) - 1))
    if not data.sharded:
        return 0.0, data.reduce_s(first)
    return data.gather_s(first) + data.gather_s(last) + data.reduce_s(first), 0.0


def _least_communication(context: Context, config: Config, data: DataAxis) -> float:
    """Network seconds of a step without stages: gathers twice and reductions once in each micro-batch, or once."""
    gathers = reduces = 0.0
    for index in range(len(context.model.blocks)):
        least = _least_elements(context, config, index)
        gathers += 2 * data.gather_s(least)
        reduces += data.reduce_s(least)
    return config.micro_batches * (gathers + reduces) if data.sharded else reduces


def fits_at_best(context: Context, config: Config, shardings: Shardings) -> bool:
    """Whether a configuration could fit if every kind took its least bytes: the stages together have room for as many
    blocks of each kind as there are, counted alone and by stage with its own micro-batches in flight. No ILP."""
    problem = _least_problem(context, config, shardings, timed=False)
    for run in problem.runs:
        room = 0.0
        for stage in range(config.pp):
            spare = problem.spare(stage)
            flying = problem.in_flight(stage)
            room += max(
                max(0.0, spare - option.transient) // max(option.resident + flying * option.inflight, 1.0)
                for option in run.options
            )
        if room < run.count:
            return False
    return True


def stage_bound(context: Context, config: Config, shardings: Shardings, sharp: bool = False) -> float:
    """A valid bound for one configuration: the stage ILP over the least seconds and the least bytes of every kind, as
    if one decision had both. Infinite when even that does not fit. ``sharp``: see `Shardings.kind_bounds`."""
    begin = time.perf_counter()
    problem = _least_problem(context, config, shardings, timed=True, sharp=sharp)
    answer = solve_stages(problem, work_limit=1.0, balance=False, gap=3e-4)
    context.clock.add("bounds", begin)
    context.clock.counts["bound ILPs"] += 1
    if answer is None:
        return float("inf")
    each, once = _least_exposed(context, config, placed(context, config, 0).data)
    return max(answer.bound + config.micro_batches * each + once, _only_bound(context, config, shardings))


def _only_bound(context: Context, config: Config, shardings: Shardings) -> float:
    """Without model axis and stages nothing is left to choose but recomputation, which only adds seconds: what the
    least of it takes is a bound."""
    if config.pp > 1 or config.tp > 1:
        return 0.0
    costs = shardings.fastest().costs
    blocks = [
        costs[kind][RECOMPUTE.index(choices[0])] for kind, choices, count in block_runs(context) for _ in range(count)
    ]
    return assess(context, config, [blocks], shardings.fastest().boundary).step_time * (1 - 1e-12)


def _least_problem(
    context: Context, config: Config, shardings: Shardings, timed: bool, sharp: bool = False
) -> StageProblem:
    bytes_of = shardings.kind_bytes()
    # Whatever passes between stages is split at most over the whole model axis.
    handed = int(min((least.inputs for least in bytes_of.values() if least.inputs), default=0))
    place = placed(context, config, handed)
    runs = []
    start = 0
    for kind, choices, count in block_runs(context):
        least = bytes_of[kind]
        elements = float(_least_elements(context, config, start))
        start += count
        seconds = {"none": 0.0, "full": 0.0}
        after = 0.0
        if timed:
            bound, copies = shardings.kind_bounds(sharp)[kind], place.data.least_copies_s(elements)
            seconds = {"none": bound.none_s + copies, "full": bound.full_s + copies}
            moved = 10 * elements / place.memory.shards * context.job.master_bytes
            device = context.cluster.device
            after = moved / max(device.memory_bandwidth, device.cache_bandwidth)
            after += place.data.reduce_s(int(elements)) if config.pp > 1 else 0.0
        options = []
        for choice in choices:
            kept = least.saved if choice == "none" else min(least.inputs, least.saved)
            # Recomputing needs what is not kept while the block runs.
            needed = least.saved - kept + place.memory.staging(elements)
            resident = place.memory.resident(elements)
            options.append(Option(choice, seconds[choice], after, resident, kept, needed))
        runs.append(BlockRun(kind, count, tuple(options)))
    overhead = tuple(float(place.memory.reserve + place.memory.buffers(s)) for s in range(config.pp))
    room = context.cluster.device.memory_bytes
    return StageProblem(tuple(runs), config.pp, config.micro_batches, room, place.transfer_s, overhead)
