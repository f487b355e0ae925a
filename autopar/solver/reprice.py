"""Prices a finished plan anew, without the search's tables: the check that a plan costs what the search said.

Walks the plan as the emitter does: decisions are checked and give layouts (`sharding.check`), layouts give local
shapes, shapes give seconds; stages give memory and, through the simulator, the step time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose, prod

from autopar.cluster import Cluster
from autopar.errors import AutoparError
from autopar.graph.ir import EXPERTS, ModelGraph
from autopar.graph.padding import as_planned
from autopar.graph.size import Size
from autopar.plan import Candidate, Plan, Predicted
from autopar.schedule import SCHEDULES
from autopar.sharding.check import check_decision, chosen, operand_layouts
from autopar.sharding.conversions import path
from autopar.sharding.layout import Layout
from autopar.sharding.local import local_shape
from autopar.sharding.rules import ring_axis
from autopar.solver.candidates import again_pieces, moved_bytes
from autopar.solver.collective_costs import CollectiveCosts
from autopar.solver.data_axis import BlockTime, DataAxis, DataTimes, stage_events, with_experts
from autopar.solver.decision_costs import expert_elements, tail_elements
from autopar.solver.groups import root_blocks
from autopar.solver.halves import HalvedBackward
from autopar.solver.memory import BlockBytes, MemoryModel
from autopar.solver.op_costs import LocalTensor, OpCosts
from autopar.solver.prices import AxisPrices, element_bytes, exchange_seconds, exposed
from autopar.solver.rank_order import transfers
from autopar.solver.recompute import exposed_copy, operator_key, step_key
from autopar.solver.ring_work import ring_time
from autopar.solver.simulate import simulate
from autopar.solver.space import model_flops

TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Repriced:
    """What the plan takes: the step, seconds of it that a device computes (the mean), its stages, bytes per stage by
    kind, and bytes of each rank on the host."""

    step_time: float
    computing_s: float
    times: tuple[DataTimes, ...]
    memory: tuple[dict[str, int], ...]
    host: tuple[int, ...]


def reprice(plan: Plan, model: ModelGraph) -> Predicted:
    """The plan's figures, priced anew (the interval is kept). Raises BadInputError for another model."""
    plan.check_model(model.fingerprint(), model.name)
    priced = price_plan(plan, model)
    step_time = priced.step_time
    peak = plan.cluster.device.peak(plan.job.dtype) * plan.cluster.devices
    return Predicted(
        step_time,
        plan.job.tokens / step_time,
        model_flops(model, plan.job) / (step_time * peak),
        plan.predicted.interval,
        plan.predicted.breakdown,
        tuple({**memory, "total": sum(memory.values())} for memory in priced.memory),
        priced.computing_s,
        plan.cluster.joules(step_time, priced.computing_s),
    )


def check_price(plan: Plan, model: ModelGraph) -> None:
    """Raise AutoparError unless the plan's figures are what it costs."""
    priced = price_plan(plan, model)
    pairs = [("step time", plan.predicted.step_time, priced.step_time)]
    energy = plan.cluster.joules(priced.step_time, priced.computing_s)
    if plan.predicted.energy_j is not None and energy is not None:
        pairs.append(("energy of a step", plan.predicted.energy_j, energy))
    pairs.append(("sum of the breakdown", plan.predicted.step_time, sum(plan.predicted.breakdown.values())))
    for index, (stage, times, memory) in enumerate(zip(plan.stages, priced.times, priced.memory, strict=True)):
        pairs.append((f"forward of stage {index}", stage.forward_s, times.forward_s))
        pairs.append((f"backward of stage {index}", stage.backward_s, times.backward_s))
        pairs.append((f"memory of stage {index}", stage.total_bytes, sum(memory.values())))
    for what, told, found in pairs:
        if not isclose(told, found, rel_tol=TOLERANCE, abs_tol=1e-12):
            raise AutoparError(
                f"the plan says its {what} is {told!r}, priced anew it is {found!r}: a defect of "
                "autopar, please report it"
            )
    room = plan.cluster.device.memory_bytes
    for rank in range(plan.mesh.pp):
        needed = sum(sum(priced.memory[stage].values()) for stage in plan.stages_of(rank))
        if needed > room:
            raise AutoparError(f"rank {rank} of the plan needs {needed} bytes of {room}: a defect of autopar")
    there = plan.cluster.device.host_memory_bytes
    if there and max(priced.host) > there:
        raise AutoparError(f"the plan keeps {max(priced.host)} bytes on a host of {there}: a defect of autopar")


def price_plan(plan: Plan, model: ModelGraph, cluster: Cluster | None = None) -> Repriced:
    """Seconds and bytes of the plan; on ``cluster`` in place of its own, if given (same shape, other figures)."""
    cluster, model = cluster or plan.cluster, as_planned(plan, model)
    ops, collectives = OpCosts(cluster.device, plan.job), CollectiveCosts(cluster, plan.job.stack)
    mesh, m = plan.mesh, plan.micro_batches
    seconds = {name: _block_seconds(plan, model, one, ops, collectives) for name, one in plan.candidates.items()}
    hosted = {
        name: moved_bytes(model.kinds[one.decision.kind], one, plan.micro_batch, plan.job) if one.offload else 0
        for name, one in plan.candidates.items()
    }
    boundary = max((_boundary_bytes(plan, model, candidate) for candidate in plan.candidates.values()), default=0)
    halving = SCHEDULES[plan.schedule].splits_backward
    staged, span = mesh.pp > 1, mesh.data_span()
    data = DataAxis(ops, collectives, (span,), plan.zero, plan.fsdp, m, halving, plan.offload, staged)
    data = with_experts(data, mesh.ep)
    reserve = cluster.device.reserve_bytes
    bytes_of = MemoryModel(
        plan.job,
        plan.fsdp,
        plan.zero,
        mesh.pp,
        m,
        boundary,
        reserve,
        plan.schedule,
        plan.vpp,
        plan.offload,
        data.replicas,
        mesh.ep,
    )
    halved = HalvedBackward(ops)
    times, blocks = [], []
    copies: dict[str, list[tuple[int, int]]] = {}
    trained: set[str] = set()
    computing = 0.0
    for index in range(len(plan.stages)):
        block_times, block_bytes = [], []
        here: dict[str, int] = {}
        placed = list(_blocks(plan, index))
        for (block, candidate), root in zip(placed, root_blocks(model, [b for b, _ in placed]), strict=True):
            doubled = doubled_frozen = 0
            for name, elements, trains in _tied(model, block, candidate):
                doubled += elements if name in here else 0
                doubled_frozen += elements if name in here and not trains else 0
                here.setdefault(name, elements)
                if trains:
                    trained.add(name)
            frozen = _frozen(model, candidate)
            forward, backward, busy = seconds[candidate.name]
            computing += m * busy / mesh.pp
            held, saved = candidate.parameters, candidate.inflight_bytes
            weights, waiting = 0.0, 0
            if halving:
                kind = model.kinds[candidate.decision.kind]
                weights, waiting = halved.of(kind, candidate.decision, plan.micro_batch)
                waiting += hosted[candidate.name]
            still = not model.kinds[candidate.decision.kind].passes_gradient
            own = held - doubled
            expert = expert_elements(model.kinds[candidate.decision.kind], candidate.decision)
            fetched = hosted[candidate.name] / cluster.device.host_bandwidth if candidate.offload else 0.0
            stays = candidate.gathered
            block_times.append(
                BlockTime(forward, backward, own, root, weights, frozen - doubled_frozen, still, fetched, expert, stays)
            )
            block_bytes.append(
                BlockBytes(
                    held,
                    saved,
                    candidate.transient_bytes,
                    doubled,
                    root,
                    waiting,
                    frozen,
                    doubled_frozen,
                    tail_elements(model.kinds[candidate.decision.kind], candidate.decision),
                    hosted[candidate.name],
                    expert,
                    stays,
                )
            )
        for name, elements in here.items():
            copies.setdefault(name, []).append((index, elements))
        times.append(data.stage(block_times))
        blocks.append(block_bytes)
    crossing = sum(sum(elements for _, elements in held[1:]) for name, held in copies.items() if name in trained)
    distance = mesh.strides()["pp"]
    tied_s = collectives.seconds("send_recv", crossing * plan.job.master_bytes / bytes_of.shards, mesh.pp, distance)
    share = max((_boundary_bytes(plan, model, one, whole=True) for one in plan.candidates.values()), default=0)
    near = min((mesh.strides()[axis] for axis in mesh.tp_axes()), default=1)
    sent_bytes, gather_s = collectives.scattered(boundary, share / (mesh.tp * mesh.cp), mesh.tp, near)
    links = collectives.handed_on(sent_bytes, mesh.pp, distance, gather_s)
    sent = transfers(plan.schedule, mesh.pp, len(times), links)
    owned = [plan.stages_of(rank) for rank in range(mesh.pp)]
    events = stage_events(times, plan.schedule, mesh.pp)
    timeline = simulate(events, m, sent, plan.schedule, plan.vpp)
    optimizer = max(sum(times[stage].optimizer_s for stage in own) for own in owned)
    step_time = timeline.total + tied_s + optimizer + ops.stack.step_s
    if plan.offload != "state":  # else the optimizer runs on the host
        computing += sum(stage.optimizer_s for stage in times) / mesh.pp
    return Repriced(step_time, computing, tuple(times), bytes_of.ranks(blocks), bytes_of.hosts(blocks))


def _blocks(plan: Plan, stage: int) -> Iterator[tuple[int, Candidate]]:
    for run in plan.stages[stage].runs:
        for block in range(run.start, run.stop):
            yield block, plan.candidates[run.candidate]


def _frozen(model: ModelGraph, candidate: Candidate) -> int:
    """Parameter elements held per rank that do not train."""
    decision = candidate.decision
    still = [node for node in model.kinds[decision.kind].graph.of("parameter") if not node.meta.requires_grad]
    return sum(prod(local_shape(node.meta.at(1, 1), decision.inputs[node.name], decision.axes)) for node in still)


def _tied(model: ModelGraph, block: int, candidate: Candidate) -> Iterator[tuple[str, int, bool]]:
    """Tied parameters of a block: name of the first of the group, elements held per rank, and whether they train."""
    first = {name: group[0] for group in model.tied for name in group}
    here = model.blocks[block]
    for node in model.kinds[here.kind].graph.of("parameter"):
        name = first.get(here.parameters[node.target])
        if name is not None:
            decision = candidate.decision
            elements = prod(local_shape(node.meta.at(1, 1), decision.inputs[node.name], decision.axes))
            yield name, elements, node.meta.requires_grad


def _boundary_bytes(plan: Plan, model: ModelGraph, candidate: Candidate, whole: bool = False) -> int:
    """Local bytes of what other blocks hand to this one; ``whole``: those of all ranks."""
    decision, job = candidate.decision, plan.job
    total = 0
    for node in model.kinds[decision.kind].graph.of("input"):
        if node.meta.requires_grad:
            shape = node.meta.at(plan.micro_batch, job.seq_len)
            local = shape if whole else local_shape(shape, decision.inputs[node.name], decision.axes)
            total += prod(local) * element_bytes(node.meta.dtype, job)
    return total


def _block_seconds(
    plan: Plan, model: ModelGraph, candidate: Candidate, ops: OpCosts, collectives: CollectiveCosts
) -> tuple[float, float, float]:
    """(forward, backward) of a candidate, recomputation included, and seconds of these that the device computes."""
    decision, job, batch = candidate.decision, plan.job, plan.micro_batch
    kind = model.kinds[decision.kind]
    graph, axes = kind.graph, decision.axes
    produced = check_decision(kind, decision, batch, job.seq_len)
    stride_of = plan.mesh.strides()
    prices = AxisPrices(ops, collectives, axes, batch, stride_of)
    pieces: dict[str, float] = {}  # forward seconds of operators and conversion steps
    starts: dict[str, float] = {}  # of these, those in which the host starts them
    sends: dict[str, float] = {}  # and those in collectives
    backward = waits = sends_back = 0.0

    def whole(shape: tuple[int | Size, ...]) -> tuple[int, ...]:
        return tuple(size.at(batch, job.seq_len) if isinstance(size, Size) else size for size in shape)

    for node in graph.of("op"):
        operands = [graph.nodes[name].meta for name in node.operands()]
        layouts = operand_layouts(node, graph, decision)
        inputs = [
            LocalTensor(local_shape(whole(meta.shape), layout, axes), element_bytes(meta.dtype, job))
            for meta, layout in zip(operands, layouts, strict=True)
        ]
        shape = local_shape(whole(node.meta.shape), produced[node.name], axes)
        output = LocalTensor(shape, element_bytes(node.meta.dtype, job))
        grads = [meta.requires_grad for meta in operands]
        choice = chosen(node, graph, decision)
        if ring := ring_axis(choice):
            held = inputs[1].nbytes + inputs[2].nbytes
            sent = collectives.seconds("send_recv", held, axes[ring], stride_of[ring])
            turns = ring_time(ops, node, inputs, output, grads, axes[ring], sent)
            starts[operator_key(node)] = turns.host_forward
            pieces[operator_key(node)] = turns.forward + turns.waits_forward
            backward += turns.backward + turns.waits_backward
            sends[operator_key(node)], sends_back = turns.waits_forward, sends_back + turns.waits_backward
            waits += turns.host_backward
            continue
        time = ops.seconds(node, inputs, output, grads)
        sent = exchange_seconds(node, inputs, collectives, plan.mesh.tp) if node.op == EXPERTS else 0.0
        starts[operator_key(node)] = time.host_forward
        ahead, back = (exposed(sent, beside, ops.stack) for beside in (time.forward, time.backward))
        pieces[operator_key(node)] = time.forward + ahead
        backward += time.backward + back
        sends[operator_key(node)], sends_back = ahead, sends_back + back
        waits += time.host_backward
        for axis, strategy in choice.items():
            for inner in strategy.inner:
                shape = local_shape(whole(inner.shape), _without(layouts[inner.like], axis, len(inner.shape)), axes)
                nbytes = prod(shape) * element_bytes(inner.dtype, job)
                seconds = collectives.seconds(inner.collective, nbytes, axes[axis], stride_of[axis])
                ahead, back = (0.0, seconds) if inner.backward else (seconds, 0.0)
                pieces[operator_key(node)] += ahead
                backward += back
                sends[operator_key(node)], sends_back = sends[operator_key(node)] + ahead, sends_back + back
    for conversion in decision.conversions:
        meta = graph.nodes[conversion.tensor].meta
        layout = conversion.source
        for place, (axis, step) in enumerate(path(layout, conversion.target, meta.requires_grad)):
            shape = local_shape(whole(meta.shape), _without(layout, axis, len(meta.shape)), axes)
            price = prices.moved(LocalTensor(shape, element_bytes(meta.dtype, job)), axis, step)
            layout = layout.with_type(axis, step.target)
            key = step_key(conversion.tensor, conversion.source, conversion.target, place)
            pieces[key], sends[key] = price.forward_s, price.sent_forward_s
            backward += price.backward_s
            sends_back += price.communication_s - price.sent_forward_s
    again = again_pieces(kind, candidate, batch, job)
    forward = max(sum(pieces.values()), sum(starts.values()))
    backward += sum(pieces[key] for key in again)
    sends_back += sum(sends[key] for key in again)
    computing = sum(pieces.values()) - sum(sends.values()) + backward - sends_back
    backward = max(backward, waits + sum(starts.get(key, 0.0) for key in again))
    if not candidate.offload:
        return forward, backward, computing
    moved, bandwidth = moved_bytes(kind, candidate, batch, job), ops.device.host_bandwidth
    out, back = exposed_copy(moved, bandwidth, forward), exposed_copy(moved, bandwidth, backward)
    return forward + out, backward + back, computing


def _without(layout: Layout, axis: str, dims: int) -> Layout:
    """How the axes other than ``axis`` split the first ``dims`` dims of a tensor."""
    kept = [(other, kind) for other, kind in layout.types if other != axis and kind.kind == "S" and kind.dim < dims]
    return Layout(tuple(kept))
