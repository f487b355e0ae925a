"""Bounds for a whole configuration: no sharding, recomputation or spread over stages takes less, or fits in less.

`quick_bound` adds up; `fits_at_best` counts bytes; `stage_bound` solves the stage ILP over the least seconds and the
least bytes of every kind of block, as if one decision had both.
"""

from __future__ import annotations

import time
from math import prod

from autopar.schedule import SCHEDULES
from autopar.solver.bounds import spread_bound
from autopar.solver.data_axis import DataAxis
from autopar.solver.evaluate import assess, placed
from autopar.solver.groups import root_blocks
from autopar.solver.shardings import Context, Shardings
from autopar.solver.space import Config
from autopar.solver.spread import block_runs, overheads, staged
from autopar.solver.stages import BlockRun, Option, StageProblem, solve_stages


def quick_bound(context: Context, config: Config, work: float) -> float:
    """No plan of this configuration takes less, given that a micro-batch's blocks take at least ``work`` seconds."""
    place = placed(context, config, 0)
    m = config.micro_batches
    total, rooted = _total_elements(context)
    trains, rooted_trains = _total_elements(context, trains=True)
    frozen, rooted_frozen = total - trains, rooted - rooted_trains
    still, rooted_still = _still_elements(context)
    parts = [(total - rooted, frozen - rooted_frozen, still), (rooted, rooted_frozen, rooted_still)]
    for root, (elements, unmoved, unpassed) in enumerate(parts):
        # A stage that any gradient passes gathers its root group each time.
        unpassed = unpassed if not root or config.pp > 1 else 0
        work += place.data.least_copies_s(elements / config.tp, bool(root), unmoved / config.tp, unpassed / config.tp)
    # Some stage holds at least its even share.
    optimizer = place.data.optimizer_s(trains / config.tp / config.pp)
    each, once = _least_exposed(context, config, place.data)
    if config.pp == 1:
        return max(m * (work + each) + once, _least_communication(context, config, place.data)) + optimizer
    return spread_bound(work, config.pp, m, config.vpp) + optimizer


def _total_elements(context: Context, trains: bool = False) -> tuple[int, int]:
    """Parameter elements of the model, and of these those that may be in a root group. ``trains``: only what trains."""
    key = ("elements", trains)
    if key not in context.memo:
        metas = {name: meta for name, meta in context.model.parameters.items() if meta.requires_grad or not trains}
        sizes = {name: prod(meta.at(1, 1)) for name, meta in metas.items()}
        context.memo[key] = sum(sizes.values()), sum(sizes.get(name, 0) for name in _rooted_names(context))
    total, rooted = context.memo[key]
    return total, rooted


def _still_elements(context: Context) -> tuple[int, int]:
    """Parameter elements of blocks that no gradient passes: of those with a group of their own, and of those that may
    be in a root group."""
    if "still elements" not in context.memo:
        model = context.model
        held = [b.parameters.values() for b in model.blocks if not model.kinds[b.kind].passes_gradient]
        names, rooted = {name for block in held for name in block} & model.parameters.keys(), _rooted_names(context)
        context.memo["still elements"] = tuple(
            sum(prod(model.parameters[name].at(1, 1)) for name in part) for part in (names - rooted, names & rooted)
        )
    own, root = context.memo["still elements"]
    return own, root


def _least_elements(context: Context, config: Config, index: int, trains: bool = False) -> int:
    """Parameter elements of block ``index`` per rank when all of them are split. Of a tied parameter the first block
    counts, and the last, if it surely sits in another stage. ``trains``: only what trains."""
    apart = config.pp > 1 and index == len(context.model.blocks) - 1
    key = ("least elements", index, apart, trains)
    if key not in context.memo:
        context.memo[key] = _whole_elements(context, index, apart, trains)
    return int(context.memo[key]) // config.tp


def _whole_elements(context: Context, index: int, apart: bool, trains: bool) -> int:
    blocks = context.model.blocks
    block = blocks[index]
    total = 0
    for node in context.model.kinds[block.kind].graph.of("parameter"):
        if trains and not node.meta.requires_grad:
            continue
        tie = context.ties.parameters.get((block.kind, node.name))
        first = next((i for i, other in enumerate(blocks) if _holds(context, other.kind, tie)), index) if tie else index
        if first == index or (apart and first == 0):
            total += prod(node.meta.at(1, 1))
    return total


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


def _least_groups(context: Context, config: Config, trains: bool = False) -> tuple[list[int], int]:
    """Least elements of what FSDP2 gathers (``trains``: and reduces), of a model in one stage: each block's own group
    (0 where it has none), and the root group."""
    roots = root_blocks(context.model, range(len(context.model.blocks)))
    least = [_least_elements(context, config, index, trains) for index in range(len(roots))]
    own = [0 if root else elements for elements, root in zip(least, roots, strict=True)]
    return own, sum(least) - sum(own)


def _least_exposed(context: Context, config: Config, data: DataAxis) -> tuple[float, float]:
    """Network seconds that nothing can hide without stages, (each micro-batch, once a step): the first gather each way
    and the last reduction. Those of the root group come first and last."""
    if config.pp > 1:
        return 0.0, 0.0
    own, rooted = _least_groups(context, config)
    trained, rooted_trained = _least_groups(context, config, trains=True)
    first, last = (rooted or own[0]), own[-1]
    reduced = rooted_trained if rooted else trained[0]
    gather, scatter = data.gather_s(first), data.scatter_s(reduced)
    # The last block has a backward, if anything trains.
    each = gather + data.gather_s(last) if data.gathers_each else 0.0
    once = data.replicate_s(reduced) + (0.0 if data.gathers_each else gather)
    return (each, once + scatter) if data.defers else (each + scatter, once)


def _least_communication(context: Context, config: Config, data: DataAxis) -> float:
    """Network seconds of a step without stages: gathers, twice under zero 3 but for the root group and what no
    gradient passes, and reductions, each of them once a step or in each micro-batch."""
    own, rooted = _least_groups(context, config)
    trained, rooted_trained = _least_groups(context, config, trains=True)
    gathers = sum(data.gather_s(n) for n in own) + data.gather_s(rooted)
    if data.gathers_each:
        kinds = [context.model.kinds[block.kind] for block in context.model.blocks]
        gathers += sum(data.gather_s(n) for n, kind in zip(own, kinds, strict=True) if kind.passes_gradient)
    reduced = (*trained, rooted_trained)
    scatters, replicates = (sum(seconds(n) for n in reduced) for seconds in (data.scatter_s, data.replicate_s))
    m = config.micro_batches
    return (m if data.gathers_each else 1) * gathers + (1 if data.defers else m) * scatters + replicates


def fits_at_best(context: Context, config: Config, shardings: Shardings) -> bool:
    """Whether a configuration could fit if every kind took its least bytes: the stages together have room for as many
    blocks of each kind as there are, counted alone and by rank with its own micro-batches in flight. No ILP."""
    problem = _least_problem(context, config, shardings, timed=False)
    for run in problem.runs:
        room = 0.0
        for rank in range(config.pp):
            spare = problem.spare(rank)
            # Whenever most is in flight, a block keeps at least what it would on some stage of the rank.
            flying = max(min(alive for alive, _ in held) for held in problem.held(rank))
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
    if config.pp > 1 or config.mesh.model_axes():
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
        elements = float(_least_elements(context, config, run.start))
        trains = float(_least_elements(context, config, run.start, trains=True))
        frozen = elements - trains
        seconds, reduce, optimizer, forward = dict.fromkeys(run.choices, 0.0), 0.0, 0.0, 0.0
        if timed:
            passes = context.model.kinds[kind].passes_gradient or (run.root and config.pp == 1)
            copies = place.data.least_copies_s(elements, run.root, frozen, 0.0 if passes else elements)
            seconds = {choice: shardings.least_seconds(kind, choice, sharp) + copies for choice in run.choices}
            optimizer = _least_optimizer(context, config, trains / place.memory.shards)
            reduce = place.data.reduce_s(int(trains)) if place.data.exposes else 0.0
            forward = _least_forward(config, shardings, kind)
        options = []
        # The last block's backward runs first, when most is in flight; of others, less is by the time of theirs.
        is_last = run.start + run.count == len(context.model.blocks)
        first_back = is_last and config.vpp == 1 and not SCHEDULES[config.schedule].splits_backward
        for choice in run.choices:
            kept, needed = shardings.least_kept(kind, choice), 0.0
            if shardings.size == 1:  # there is one decision, and these are its bytes
                cost = shardings.fastest().costs[kind][choice]
                kept, needed = float(cost.inflight), float(cost.transient) if first_back else 0.0
            resident = place.memory.least_resident(elements, run.root and run.sure, frozen)
            ahead = min(forward, seconds[choice])
            back = seconds[choice] - ahead
            # Nothing is known of the halves of a backward: all of it may wait.
            options.append(Option(choice, ahead, back, resident, kept, needed, reduce, optimizer, weight_s=back))
        runs.append(BlockRun(kind, run.count, tuple(options)))
    return staged(
        context, config, place, runs, overheads(place, config, least=True), context.cluster.device.memory_bytes
    )


def _least_forward(config: Config, shardings: Shardings, kind: str) -> float:
    """Of a kind's least seconds, those that surely are forward. None under GPipe, whose slowest forward and backward
    count apart: only their sum is known."""
    return shardings.kind_bounds(False)[kind].forward_s if config.schedule != "gpipe" else 0.0


def _least_optimizer(context: Context, config: Config, share: float) -> float:
    """Seconds of the optimizer and clipping that grow with the elements a rank keeps, caches and launches left out."""
    device, job = context.cluster.device, context.job
    moved = (6 + 2 * job.moments) * share * job.master_bytes
    if config.offload == "state":
        return moved / device.host_memory_bandwidth
    return moved / max(device.memory_bandwidth, device.cache_bandwidth)
