"""The chosen assessment as a `Plan`: candidates by name, runs of blocks per stage, figures."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

from autopar.plan import Candidate, Plan, Predicted, Run, Stage
from autopar.sharding.data_parallel import samples_mixed
from autopar.sharding.rules import has_rule
from autopar.solver.candidates import BlockCost
from autopar.solver.context import Context
from autopar.solver.evaluate import Assessment, Placed, placed
from autopar.solver.interval import interval_of
from autopar.solver.space import model_flops
from autopar.solver.spread import block_runs


def plan_of(
    context: Context, best: Assessment, bound: float, gap: float, counts: dict[str, int], free: float | None
) -> Plan:
    """The plan that ``best`` stands for. ``gap``: up to which it is called optimal; ``free``: `Plan.free_step_time`."""
    config, job, cluster = best.config, context.job, context.cluster
    names = candidate_names([cost for stage in best.stages for cost in stage])
    place = placed(context, config, 0)
    rooted = {run.kind for run in block_runs(context, config) if run.root}
    candidates = {name: _candidate(name, cost, cost.kind in rooted, place) for name, cost in names}
    by_cost = {id(cost): name for name, cost in names}
    known = [(cost, name) for name, cost in names]

    def name_of(cost: BlockCost) -> str:
        return by_cost.get(id(cost)) or next(name for other, name in known if other == cost)

    stages = []
    start = 0
    for costs, times, memory in zip(best.stages, best.times, best.memory, strict=True):
        runs = []
        for name, group in groupby(costs, key=name_of):
            stop = start + len(list(group))
            runs.append(Run(start, stop, name))
            start = stop
        once = times.first_s + times.last_s + times.reduce_s + times.optimizer_s
        stages.append(Stage(tuple(runs), times.forward_s, times.backward_s, once, memory))
    peak = cluster.device.peak(job.dtype) * cluster.devices
    step_time = best.step_time
    predicted = Predicted(
        step_time=step_time,
        tokens_per_second=job.tokens / step_time,
        mfu=model_flops(context.model, job) / (step_time * peak),
        interval=(step_time, step_time),
        breakdown=best.breakdown,
        memory=tuple(stage.memory_and_total for stage in stages),
        computing_s=best.computing_s,
        energy_j=cluster.joules(step_time, best.computing_s),
    )
    distance = max(0.0, (step_time - bound) / bound)
    plan = Plan(
        model=context.model.name,
        fingerprint=(context.source or context.model).fingerprint(),
        cluster=cluster,
        job=job,
        mesh=config.mesh,
        micro_batch=config.micro_batch,
        micro_batches=config.micro_batches,
        schedule=config.schedule,
        zero=config.zero,
        candidates=candidates,
        stages=tuple(stages),
        predicted=predicted,
        bound=bound,
        gap=distance,
        status="optimal" if distance <= gap else "feasible",
        fixed=context.fix.given(),
        searched=counts,
        seconds={},
        fsdp=config.fsdp,
        vpp=config.vpp,
        offload=config.offload,
        pad_heads=config.pad_heads,
        equal_blocks=context.equal_blocks,
        free_step_time=free,
        notes=(*context.model.notes, *_long(context), *_unruled(context), *_mixing(context)),
    )
    return replace(plan, predicted=replace(predicted, interval=interval_of(plan, context.source or context.model)))


def _long(context: Context) -> list[str]:
    nominal, seq = context.model.nominal_seq, context.job.seq_len
    if nominal is None or seq <= nominal:
        return []
    return [f"seq_len {seq} is beyond the {nominal} positions of the model's config; nothing in the model stops it"]


def _unruled(context: Context) -> list[str]:
    """What the user should know of operators that no rule covers."""
    names = dict.fromkeys(
        node.op
        for kind in context.model.kinds.values()
        for node in kind.graph.of("op")
        if node.operands() and not has_rule(node, kind.graph)
    )
    return [
        f"{name} has no sharding rule and runs whole on every rank (rules: autopar/sharding/rules)" for name in names
    ]


def _mixing(context: Context) -> list[str]:
    return [
        f"{operator} mixes the samples of a micro-batch: each one, of each data rank, is computed within itself"
        for operator in samples_mixed(context.model)[:1]
    ]


def candidate_names(costs: list[BlockCost]) -> list[tuple[str, BlockCost]]:
    """A name for every different cost: the kind, then how it is recomputed, if it is, "offload" if what it keeps waits
    on the host, and "gathered" if its parameters stay so; then a number if several."""
    names: list[tuple[str, BlockCost]] = []
    for cost in costs:
        if any(cost is other or cost == other for _, other in names):
            continue
        base = "/".join([cost.kind, *([cost.recompute] if cost.recompute != "none" else [])])
        base += ("/offload" if cost.offload else "") + ("/gathered" if cost.gathered else "")
        taken = {name for name, _ in names}
        name, number = base, 2
        while name in taken:
            name, number = f"{base}/{number}", number + 1
        names.append((name, cost))
    return names


def _candidate(name: str, cost: BlockCost, root: bool, place: Placed) -> Candidate:
    once = place.data.of("optimizer_s", cost.trains, cost.expert)
    if place.data.defers:
        once += place.data.of("reduce_s", cost.trains, cost.expert)
    resident = place.memory.resident(cost.elements, root, cost.frozen, cost.expert, cost.gathered)
    return Candidate(
        name=name,
        decision=cost.decision,
        recompute=cost.recompute,
        forward_s=cost.forward_s,
        backward_s=cost.backward_s,
        step_s=once,
        resident_bytes=round(resident),
        inflight_bytes=cost.inflight,
        transient_bytes=cost.transient,
        parameters=cost.elements,
        saved=cost.saved,
        offload=cost.offload,
        sources=dict(cost.sources),
        gathered=cost.gathered,
    )
