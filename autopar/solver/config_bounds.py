"""Bounds for a whole configuration: no sharding, recomputation or spread over stages takes less, or fits in less.

`shape_bound` divides work evenly; `quick_bound` adds up what a configuration surely waits for; `stage_bound` solves the
least stage problem (`least_problems`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from autopar.graph.ir import TensorMeta
from autopar.schedule import SCHEDULES
from autopar.solver.beside import least_beside
from autopar.solver.bounds import spread_bound
from autopar.solver.context import Context
from autopar.solver.data_axis import DataAxis
from autopar.solver.elements import least_experts, least_groups, still_elements, total_elements
from autopar.solver.evaluate import assess, placed
from autopar.solver.gather_bound import gather_bound
from autopar.solver.groups import root_blocks
from autopar.solver.laps import laps_bound
from autopar.solver.least_problem import least_problems
from autopar.solver.op_costs import LocalTensor
from autopar.solver.path_bound import path_bound, program_bound
from autopar.solver.prices import element_bytes
from autopar.solver.reach import reach
from autopar.solver.room import most_gathered
from autopar.solver.shardings import Shardings
from autopar.solver.space import Config, Shape
from autopar.solver.stages import StageProblem, least_seconds


def shape_bound(context: Context, shape: Shape, work: float | None = None) -> float:
    """No plan of any configuration of the shape takes less. ``work``: least seconds of all blocks per micro-batch;
    without it, those of the arithmetic alone, evenly shared out."""
    outline, m = shape.outline, shape.outline.micro_batches
    share = outline.micro_batch / outline.ranks
    forward, both = (seconds * share for seconds in arithmetic_s(context))
    work = both if work is None else work
    # A micro-batch passes all stages, there and back; halved backwards may leave the weights' half for later.
    through = forward if SCHEDULES[shape.schedule].splits_backward else work
    return max(through, spread_bound(work, outline.pp, m, shape.vpp))


def arithmetic_s(context: Context) -> tuple[float, float]:
    """Seconds of a sample's arithmetic on one device: forward, and with backward."""
    if "arithmetic" not in context.memo:
        seq, job = context.job.seq_len, context.job

        def local(meta: TensorMeta) -> LocalTensor:
            return LocalTensor(meta.at(1, seq), element_bytes(meta.dtype, job))

        totals = [0.0, 0.0]
        for name, kind in context.model.kinds.items():
            for node in kind.graph.of("op"):
                metas = [kind.graph.nodes[operand].meta for operand in node.operands()]
                grads = [meta.requires_grad for meta in metas]
                each = context.ops.arithmetic_seconds(node, [local(meta) for meta in metas], local(node.meta), grads)
                totals = [total + context.counts[name] * seconds for total, seconds in zip(totals, each, strict=True)]
        context.memo["arithmetic"] = totals[0] * (1 - 1e-12), sum(totals) * (1 - 1e-12)
    forward, both = context.memo["arithmetic"]
    return float(forward), float(both)


def quick_bound(context: Context, config: Config, work: float, halves: tuple[float, float] = (0.0, 0.0)) -> float:
    """No plan of this configuration takes less, given that a micro-batch's blocks take at least ``work`` seconds, and
    at least ``halves`` forward and backward."""
    place = placed(context, config, 0)
    m = config.micro_batches
    total, rooted = total_elements(context)
    trains, rooted_trains = total_elements(context, trains=True)
    frozen, rooted_frozen = total - trains, rooted - rooted_trains
    still, rooted_still = still_elements(context)
    gathered = most_gathered(context, config)
    parts = [(total - rooted, frozen - rooted_frozen, still), (rooted, rooted_frozen, rooted_still)]
    for root, (elements, unmoved, unpassed) in enumerate(parts):
        # A stage that any gradient passes gathers its root group each time.
        unpassed = unpassed if not root or config.pp > 1 else 0
        stays = 0.0 if root else gathered * config.tp / max(elements, 1)
        work += place.data.least_copies_s(
            elements / config.tp, bool(root), unmoved / config.tp, unpassed / config.tp, min(1.0, stays)
        )
    # Some stage holds at least its even share.
    optimizer = place.data.optimizer_s(trains / config.tp / config.pp)
    ahead, back, first, last = _least_sent(context, config, place.data)
    # Neither half of a stage's micro-batch ends before its blocks, nor before what its data ranks send.
    sent = max(halves[0] + back, ahead + halves[1], ahead + back)
    if config.pp > 1:
        beside = least_beside(context, config, place.data)
        waited = max(work + float((beside.ahead + beside.back).sum()), sent)
        return spread_bound(waited, config.pp, m, config.vpp) + optimizer
    each, once = _least_exposed(context, config, place.data)
    # The first forward and the last backward take as long as what is sent in them alone, too.
    longer = max(halves[0] + back + last, first + ahead + halves[1]) - work
    return max(m * work + max(m * each + once, longer), m * sent, m * (ahead + back) + first + last) + optimizer


def _least_exposed(context: Context, config: Config, data: DataAxis) -> tuple[float, float]:
    """Network seconds that nothing can hide without stages, (each micro-batch, once a step): the first gather each way
    and the last reduction. Those of the root group come first and last."""
    if config.pp > 1:
        return 0.0, 0.0
    own, rooted = least_groups(context, config)
    trained, rooted_trained = least_groups(context, config, trains=True)
    first, last = (rooted or own[0]), own[-1]
    reduced = rooted_trained if rooted else trained[0]
    gather, again, scatter = data.gather_s(first), data.gather_s(last), data.scatter_s(reduced)
    # What may stay gathered is gathered once.
    stays = most_gathered(context, config)
    free = data.gathers_each and (bool(rooted) or stays < first)
    # The last block has a backward, if anything trains.
    each = (gather if free else 0.0) + (again if data.gathers_each and stays < last else 0.0)
    once = data.replicate_s(reduced) + (0.0 if free else gather)
    return (each, once + scatter) if data.defers else (each + scatter, once)


def _least_sent(context: Context, config: Config, data: DataAxis) -> tuple[float, float, float, float]:
    """Network seconds of all blocks (in each forward, in each backward, more in the first forward, in the last
    backward): gathers, twice under zero 3 but for the root group and what no gradient passes, and reductions. Of
    several stages' root groups nothing is sure."""
    groups, rooted, rooted_trained = _groups(context, config)
    if config.pp > 1:
        rooted = rooted_trained = 0
    gathers, again = data.gather_s(rooted), 0.0
    scatters, replicates = data.scatter_s(rooted_trained), data.replicate_s(rooted_trained)
    # Elements of groups that may stay gathered, with what each of these gathers takes. Without stages one micro-batch
    # of a step still gathers them before its forward.
    spared: list[tuple[float, float, float]] = []
    left = 1.0 if config.pp > 1 else 1 - 1 / config.micro_batches
    for (held, trained, expert, passes), count in groups.items():
        gather = count * data.of("gather_s", held + expert, expert)
        spared.append((count * (held + expert), left * gather, gather if passes else 0.0))
        gathers, again = gathers + gather, again + (gather if passes else 0.0)
        scatters += count * data.of("scatter_s", trained + expert, expert)
        replicates += count * data.of("replicate_s", trained + expert, expert)
    if stays := most_gathered(context, config):
        gathers -= _most_spared([(held, ahead) for held, ahead, _ in spared], stays)
        again -= _most_spared([(held, back) for held, _, back in spared], stays)
    ahead, back, first = (gathers, again, 0.0) if data.gathers_each else (0.0, 0.0, gathers)
    if data.defers:
        return ahead, back, first, scatters + replicates
    return ahead, back + scatters, first, replicates


def _most_spared(groups: list[tuple[float, float]], elements: float) -> float:
    """The most seconds that so many elements of ``groups`` (elements, seconds), or parts of these, can spare."""
    spared = 0.0
    for held, seconds in sorted(groups, key=lambda group: group[1] / max(group[0], 1), reverse=True):
        share = min(1.0, elements / held) if held else 1.0
        spared, elements = spared + share * seconds, elements - share * held
    return spared


def _groups(context: Context, config: Config) -> tuple[Counter[tuple[int, int, int, bool]], int, int]:
    """What FSDP2 gathers at least: groups of blocks by elements, how many of them train, elements of experts, and
    whether a gradient passes; the root group's elements, and those that train."""
    key = ("groups", config.tp, config.pp > 1)
    if key not in context.memo:
        own, rooted = least_groups(context, config)
        trained, rooted_trained = least_groups(context, config, trains=True)
        found: Counter[tuple[int, int, int, bool]] = Counter()
        for index, (n, trains) in enumerate(zip(own, trained, strict=True)):
            passes = context.model.kinds[context.model.blocks[index].kind].passes_gradient
            found[n, trains, least_experts(context, config, index) if n else 0, passes] += 1
        context.memo[key] = found, rooted, rooted_trained
    groups, root, root_trained = context.memo[key]
    return groups, root, root_trained


def loose_bound(context: Context, configs: Sequence[Config], shardings: Shardings, paths: bool = True) -> float:
    """A valid bound for all configurations of one shape together: every kind of seconds and bytes the least of any.
    ``paths``: with `path_bound`, which takes longer."""
    return _spread_bound(context, configs, shardings, paths) if configs else float("inf")


def stage_bound(
    context: Context,
    config: Config,
    shardings: Shardings,
    sharp: bool = False,
    paths: bool = True,
    enough: float = float("inf"),
) -> float:
    """A valid bound for one configuration: stages over the least seconds and the least bytes of every kind, as if one
    decision had both. Infinite when even that does not fit. ``sharp``: see `Shardings.kind_bounds`, and with
    `program_bound`; ``paths``: with `path_bound`; both take longer. ``enough``: seconds from which on a higher bound is
    of no use."""
    each, once = _least_exposed(context, config, placed(context, config, 0).data)
    beside = config.micro_batches * each + once
    found = _spread_bound(context, [config], shardings, paths, sharp, enough - beside)
    return max(found + beside, _only_bound(context, config, shardings))


def _spread_bound(
    context: Context,
    configs: Sequence[Config],
    shardings: Shardings,
    paths: bool,
    sharp: bool = False,
    enough: float = float("inf"),
) -> float:
    begin = time.perf_counter()
    problems, found = least_problems(context, configs, shardings, sharp), 0.0
    for problem in problems if paths else problems[:1]:
        found = max(found, _problem_bound(problem, paths, sharp, enough))
        if found >= enough:
            break
    context.clock.add("bounds", begin)
    context.clock.counts["stage bounds"] += 1
    return found


def _problem_bound(problem: StageProblem, paths: bool, sharp: bool, enough: float) -> float:
    if problem.vpp == 1:
        reached = reach(problem, even=False)
        found = reached.bound if reached else float("inf")
    else:
        found = laps_bound(problem)
    if found < float("inf") and problem.pp == 1 and sharp:
        found = max(found, least_seconds(problem, work_limit=0.5))
    found += problem.ends_s
    if found < enough and problem.pp > 1 and paths:
        found = max(found, path_bound(problem) + problem.ends_s)
        found = max(found, program_bound(problem) + problem.ends_s) if sharp and found < enough else found
    return found


def _only_bound(context: Context, config: Config, shardings: Shardings) -> float:
    """Without model axis and stages all that is left to choose is recomputation, which only adds seconds, and what
    stays gathered, which spares some: the least of one with all of the other is a bound, and so is `gather_bound`."""
    if config.pp > 1 or config.mesh.model_axes():
        return 0.0
    key = ("only bound", config)
    if key not in context.memo:
        context.memo[key] = _fastest_bound(context, config, shardings)
    return float(context.memo[key])


def _fastest_bound(context: Context, config: Config, shardings: Shardings) -> float:
    answer, found = shardings.fastest(), 0.0
    blocks = [
        min((answer.costs[kind][choice] for choice in choices), key=lambda cost: cost.forward_s + cost.backward_s)
        for kind, choices in context.freedom()
    ]
    if most_gathered(context, config):
        found = gather_bound(context, config, least_problems(context, [config], shardings)[0], blocks, answer)
        roots = root_blocks(context.model, range(len(blocks)))
        blocks = [replace(cost, gathered=not root) for cost, root in zip(blocks, roots, strict=True)]
    return max(found, assess(context, config, [blocks], answer.boundary).step_time * (1 - 1e-12))
