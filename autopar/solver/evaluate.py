"""From a configuration and block costs to stages, seconds and bytes: what a plan is predicted to take.

`assess` prices given stages; `best_stages` finds them by the stage ILP over the candidates of one set of compatible
answers; `stage_bound` runs the same ILP over what no decision can undercut, a valid bound for the configuration.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from math import prod

from autopar.solver.bounds import spread_bound
from autopar.solver.candidates import BlockCost
from autopar.solver.data_axis import BlockTime, DataAxis, DataTimes
from autopar.solver.groups import root_blocks
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
    ends = list(accumulate(len(costs) for costs in stages))
    roots = [root_blocks(context.model, range(end - len(costs), end)) for costs, end in zip(stages, ends, strict=True)]
    rows = [list(zip(*row, strict=True)) for row in zip(stages, shared, roots, strict=True)]
    times = tuple(
        place.data.stage([BlockTime(c.forward_s, c.backward_s, c.elements - double, root) for c, double, root in row])
        for row in rows
    )
    memory = tuple(
        place.memory.stage(
            index, [BlockBytes(c.elements, c.inflight, c.transient, double, root) for c, double, root in row]
        )
        for index, row in enumerate(rows)
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


@dataclass(frozen=True, slots=True)
class KindRun:
    """``count`` consecutive blocks from ``start`` of one kind and freedom. ``root``: their stage's root group holds
    them, or may (``sure`` False: only if a block they share a weight with is in the same stage)."""

    kind: str
    choices: tuple[str, ...]
    start: int
    count: int
    root: bool
    sure: bool


def block_runs(context: Context, config: Config, extended: bool = False) -> list[KindRun]:
    """The chain of blocks as runs of alike ones. ``extended``: see `Context.freedom`."""
    blocks = context.model.blocks
    rooted = root_blocks(context.model, range(len(blocks)))
    alike = [
        (kind, choices, root, config.pp == 1 or not (root and block.path))
        for (kind, choices), root, block in zip(context.freedom(extended), rooted, blocks, strict=True)
    ]
    runs, start = [], 0
    for (kind, choices, root, sure), group in groupby(alike):
        count = len(list(group))
        runs.append(KindRun(kind, choices, start, count, root, sure))
        start += count
    return runs


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
) -> tuple[StageProblem, list[list[BlockCost]]]:
    """The stage ILP of a configuration over compatible answers, and the cost each option stands for. ``extended``: see
    `Context.freedom`."""
    boundary = max(answer.boundary for answer in answers)
    place = placed(context, config, boundary)
    kinds = block_runs(context, config, extended)
    costs_of = [
        _undominated([answer.costs[run.kind][choice] for answer in answers for choice in run.choices]) for run in kinds
    ]
    most = [max(cost.elements for cost in costs) for costs in costs_of]
    pending = place.memory.pending(max((n for n, run in zip(most, kinds, strict=True) if not run.root), default=0))
    ending = place.memory.root_staging(_most_rooted(kinds, most, config.pp))
    runs = []
    for run, costs in zip(kinds, costs_of, strict=True):
        options = []
        for cost in costs:
            needed = cost.transient + (pending if run.root else 0.0)
            needed = max(needed, ending) if run.root else needed
            if not (run.root and run.sure):
                needed = max(needed, cost.transient + place.memory.staging(cost.elements))
            options.append(_option(place, cost, run.root, needed))
        runs.append(BlockRun(run.kind, run.count, tuple(options)))
    overhead = [float(place.memory.buffers(s) + place.memory.reserve) for s in range(config.pp)]
    if config.pp == 1:
        stage = [(costs[0], run.root) for costs, run in zip(costs_of, kinds, strict=True) for _ in range(run.count)]
        doubles = tied_elements(context, [[cost for cost, _ in stage]])[0][0]
        for double, (_, root) in zip(doubles, stage, strict=True):
            overhead[0] -= place.memory.resident(double, root)
    room = context.cluster.device.memory_bytes if capacity is None else capacity
    problem = StageProblem(tuple(runs), config.pp, config.micro_batches, room, place.transfer_s, tuple(overhead))
    return problem, costs_of


def _most_rooted(runs: Sequence[KindRun], elements: Sequence[int], stages: int) -> int:
    """The most elements that one stage's root group can hold; ``elements``: of each run's largest block."""
    held = [run.count * n if run.root else 0 for run, n in zip(runs, elements, strict=True)]
    # The first block and the last are never in one stage of several.
    apart = min(elements[0], elements[-1]) if stages > 1 and runs[0].root and runs[-1].root else 0
    return sum(held) - apart


def _option(place: Placed, cost: BlockCost, root: bool, transient: float) -> Option:
    data, elements = place.data, cost.elements
    copies, gather, reduce = data.gather_copy_s(elements), data.gather_s(elements), data.reduce_s(elements)
    forward = cost.forward_s
    backward = cost.backward_s + data.reduce_copy_s(elements)
    after = 0.0
    if data.pipelined:
        after = reduce + copies + (gather if root else max(0.0, gather - forward - copies))
    elif root:
        forward += copies + gather
        backward += reduce if data.sharded else 0.0
        after = 0.0 if data.sharded else reduce
    else:
        forward = max(forward + copies, gather)
        if data.sharded:
            backward = max(backward + copies, gather + reduce)
    share = elements / place.memory.shards
    after += data.ops.optimizer_seconds(int(share)) + data.ops.clip_seconds(int(share))
    # What communication hides costs a little all the same, so that nothing is recomputed for nothing.
    own = 1e-6 * (cost.forward_s + cost.backward_s)
    return Option(
        name=f"{cost.kind}/{cost.recompute}",
        seconds=forward + backward + own,
        after_s=after,
        resident=place.memory.resident(elements, root),
        inflight=cost.inflight,
        transient=transient,
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
    context: Context,
    config: Config,
    answers: Sequence[Answered],
    cutoff: float = float("inf"),
    extended: bool = False,
) -> Assessment | None:
    """The fastest stages that fit, over compatible answers; None if none fit. ``cutoff``: a step time that is of no use
    any more; stages that cannot be faster are found less carefully. ``extended``: see `Context.freedom`."""
    begin = time.perf_counter()
    problem, costs_of = stage_problem(context, config, answers, extended=extended)
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
    sizes = {name: prod(meta.at(1, 1)) for name, meta in context.model.parameters.items()}
    total, rooted = sum(sizes.values()), sum(sizes[name] for name in _rooted_names(context))
    work += place.data.least_copies_s((total - rooted) / config.tp)
    work += place.data.least_copies_s(rooted / config.tp, root=True)
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


def _rooted_names(context: Context) -> set[str]:
    """Parameters that may be in a root group, tied ones under the first of their names."""
    model = context.model
    first = {name: group[0] for group in model.tied for name in group}
    names = set()
    for block, root in zip(model.blocks, root_blocks(model, range(len(model.blocks))), strict=True):
        if root:
            names |= {first.get(name, name) for name in block.parameters.values()}
    return names & model.parameters.keys()


def _least_groups(context: Context, config: Config) -> tuple[list[int], int]:
    """Least elements of what FSDP2 gathers and reduces, of a model in one stage: each block's own group (0 where it has
    none), and the root group."""
    roots = root_blocks(context.model, range(len(context.model.blocks)))
    least = [_least_elements(context, config, index) for index in range(len(roots))]
    own = [0 if root else elements for elements, root in zip(least, roots, strict=True)]
    return own, sum(least) - sum(own)


def _least_exposed(context: Context, config: Config, data: DataAxis) -> tuple[float, float]:
    """Network seconds that nothing can hide without stages, (each micro-batch, once a step): the first gather each way
    and the last reduction. Those of the root group come first and last."""
    if config.pp > 1:
        return 0.0, 0.0
    own, rooted = _least_groups(context, config)
    first, last = (rooted or own[0]), own[-1]
    reduce = data.reduce_s(first) if first else 0.0
    if not data.sharded:
        return 0.0, reduce
    return (data.gather_s(first) if first else 0.0) + (data.gather_s(last) if last else 0.0) + reduce, 0.0


def _least_communication(context: Context, config: Config, data: DataAxis) -> float:
    """Network seconds of a step without stages: gathers twice (once for the root group) and reductions once in each
    micro-batch, or reductions once."""
    own, rooted = _least_groups(context, config)
    gathers = 2 * sum(data.gather_s(n) for n in own if n) + (data.gather_s(rooted) if rooted else 0.0)
    reduces = sum(data.reduce_s(n) for n in (*own, rooted) if n)
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
        min((costs[kind][choice] for choice in choices), key=lambda cost: cost.forward_s + cost.backward_s)
        for kind, choices in context.freedom()
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
    for run in block_runs(context, config, extended=True):
        kind = run.kind
        least = bytes_of[kind]
        elements = float(_least_elements(context, config, run.start))
        seconds, after = dict.fromkeys(run.choices, 0.0), 0.0
        if timed:
            copies = place.data.least_copies_s(elements, run.root)
            seconds = {choice: shardings.least_seconds(kind, choice, sharp) + copies for choice in run.choices}
            moved = 10 * elements / place.memory.shards * context.job.master_bytes
            device = context.cluster.device
            after = moved / max(device.memory_bandwidth, device.cache_bandwidth)
            after += place.data.reduce_s(int(elements)) if config.pp > 1 else 0.0
        options = []
        staging = 0.0 if run.root else place.memory.staging(elements)
        for choice in run.choices:
            if shardings.size == 1:  # there is one decision, and these are its bytes
                cost = shardings.fastest().costs[kind][choice]
                kept, needed = float(cost.inflight), cost.transient + staging
            else:
                kept = shardings.least_kept(kind, choice)
                # Recomputing all needs what is not kept while the block runs.
                needed = (least.saved - kept if choice == "full" else 0.0) + staging
            resident = place.memory.resident(elements, run.root and run.sure)
            options.append(Option(choice, seconds[choice], after, resident, kept, needed))
        runs.append(BlockRun(kind, run.count, tuple(options)))
    overhead = tuple(float(place.memory.reserve + place.memory.buffers(s)) for s in range(config.pp))
    room = context.cluster.device.memory_bytes
    return StageProblem(tuple(runs), config.pp, config.micro_batches, room, place.transfer_s, overhead)
