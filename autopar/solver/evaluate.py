"""What given stages take: from a configuration and block costs to seconds and bytes of every stage and of the step.

The stages themselves are found by `spread`; bounds for whole configurations are in `config_bounds`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

from autopar.errors import UnsupportedError
from autopar.schedule import SCHEDULES
from autopar.sharding.local import local_shape
from autopar.solver.candidates import BlockCost
from autopar.solver.context import Context
from autopar.solver.data_axis import BlockTime, DataAxis, DataTimes, stage_events, with_experts
from autopar.solver.decision_costs import boundary_bytes, tail_elements
from autopar.solver.decisions import whole_decisions
from autopar.solver.groups import root_blocks
from autopar.solver.halves import Halves
from autopar.solver.memory import BlockBytes, MemoryModel
from autopar.solver.rank_order import lying, transfers
from autopar.solver.simulate import simulate
from autopar.solver.space import Config, orders_in


@dataclass(frozen=True, slots=True)
class Assessment:
    """Stages of block costs with their seconds, bytes and the step time of the whole. ``host``: bytes of every rank
    that wait on the host; ``boundary``: the most local bytes that a stage hands on. ``computing_s``: seconds of the
    step that a device computes, on average; ``sought_s``: what a search seeks the least of (`computing`)."""

    config: Config
    stages: tuple[tuple[BlockCost, ...], ...]
    times: tuple[DataTimes, ...]
    memory: tuple[dict[str, int], ...]
    host: tuple[int, ...]
    step_time: float
    breakdown: dict[str, float]
    boundary: int
    computing_s: float
    sought_s: float

    def rank_of(self, stage: int) -> int:
        """The pipeline rank of a stage."""
        return SCHEDULES[self.config.schedule].rank_of(stage, self.config.pp)

    def rank_bytes(self) -> list[int]:
        """Bytes of every rank, all its stages together."""
        held = [0] * self.config.pp
        for stage, memory in enumerate(self.memory):
            held[self.rank_of(stage)] += sum(memory.values())
        return held


def host_shortage(context: Context, assessment: Assessment) -> int:
    """Bytes that the fullest host lacks for each device, 0 where all have room or their memory is not known."""
    room = context.cluster.device.host_memory_bytes
    return max(0, max(assessment.host) - room) if room else 0


def within_memory(context: Context, assessment: Assessment) -> bool:
    """Whether devices and hosts have room for all of it."""
    room = context.cluster.device.memory_bytes
    return max(assessment.rank_bytes()) <= room and not host_shortage(context, assessment)


@dataclass(frozen=True, slots=True)
class Placed:
    """What a configuration's prices depend on. ``transfers``: seconds of each stage's handing on to the next."""

    data: DataAxis
    memory: MemoryModel
    transfers: tuple[float, ...]

    def transfer_s(self, least: bool = False) -> float:
        """The most seconds of any (``least``: the fewest of those between two ranks)."""
        sent = [seconds for seconds in self.transfers if seconds]
        return (min(sent) if least else max(sent)) if sent else 0.0


def placed(context: Context, config: Config, boundary: int) -> Placed:
    """The data ranks, memory and stage links of a configuration whose stages hand on ``boundary`` local bytes.

    Raises UnsupportedError for state offload on a device whose link to the host is not known."""
    device = context.cluster.device
    mesh = config.mesh
    if config.offload == "state" and not (device.host_bandwidth and device.host_memory_bandwidth):
        raise UnsupportedError(
            f"fix: offload=state on device {device.name!r}, whose host_bandwidth and host_memory_bandwidth are not "
            "known; give both in a cluster file, or use offload=none"
        )
    data, apart = _data(context, config)
    memory = MemoryModel(
        context.job,
        fsdp=config.fsdp,
        zero=config.zero,
        pp=config.pp,
        micro_batches=config.micro_batches,
        boundary=boundary,
        reserve=device.reserve_bytes,
        schedule=config.schedule,
        vpp=config.vpp,
        offload=config.offload,
        replicas=data.replicas,
        ep=config.ep,
    )
    sent, gather_s = float(boundary), 0.0
    if context.ops.stack.scatters:
        near = min((mesh.strides()[axis] for axis in mesh.tp_axes()), default=1)
        sent, gather_s = context.collectives.scattered(boundary, _share(context, config), config.tp, near)
    every = [context.collectives.handed_on(sent, config.pp, stride, gather_s) for stride in apart]
    links = every[0] if len(every) == 1 else tuple(map(min, *every))
    return Placed(data, memory, transfers(config.schedule, config.pp, config.stages, links))


def _data(context: Context, config: Config) -> tuple[DataAxis, tuple[int, ...]]:
    """The data ranks of a configuration, which many differ in little else than from each other; and how far apart
    neighbouring stages are (`lying`)."""
    halved = SCHEDULES[config.schedule].splits_backward
    ranks = (config.mesh, config.order, config.zero, config.fsdp, config.micro_batches, config.offload, config.ep)
    key = ("data", halved, ranks)
    if key not in context.memo:
        spans, apart = lying(config.mesh, orders_in(config, context.cluster))
        data = DataAxis(
            context.ops,
            context.collectives,
            spans=spans,
            zero=config.zero,
            fsdp=config.fsdp,
            micro_batches=config.micro_batches,
            halves=halved,
            offload=config.offload,
            staged=config.pp > 1,
        )
        context.memo[key] = with_experts(data, config.ep), apart
    data, apart = context.memo[key]
    return data, apart


def _share(context: Context, config: Config) -> float:
    """Bytes of an even share of what blocks hand on, as the ranks of a stage may hold it."""
    key = ("handed on", config.micro_batch)
    if key not in context.memo:
        context.memo[key] = max(
            boundary_bytes(context.model.kinds[name], decision, config.micro_batch, context.job)
            for name, decision in whole_decisions(context.model).items()
        )
    return float(context.memo[key]) / (config.tp * config.cp)


def halves(context: Context, config: Config, cost: BlockCost) -> Halves:
    """Seconds of a block's weight gradients and bytes that wait for them, if the schedule halves backwards: also what
    came back from the host, which stays until the graph is gone."""
    if not SCHEDULES[config.schedule].splits_backward:
        return 0.0, 0
    context = context.padded(config.pad_heads)
    seconds, waiting = context.halved.of(context.model.kinds[cost.kind], cost.decision, config.micro_batch)
    return seconds, waiting + cost.hosted


Shared = tuple[int, int]
"""Parameter elements of a block that an earlier one of the stage holds already, and of these those that are frozen."""


def tied_elements(context: Context, stages: Sequence[Sequence[BlockCost]]) -> tuple[list[list[Shared]], int]:
    """`Shared` per stage and block; and the most elements whose gradients stages must add up, because several hold a
    copy."""
    shared: list[list[Shared]] = []
    holders: dict[str, int] = {}
    crossing = 0
    for costs in stages:
        seen: set[str] = set()
        row = []
        for cost in costs:
            duplicate = frozen = 0
            graph = context.model.kinds[cost.kind].graph
            for node in graph.of("parameter"):
                tie = context.ties.parameters.get((cost.kind, node.name))
                if tie is None:
                    continue
                layout = cost.decision.inputs[node.name]
                elements = prod(local_shape(node.meta.at(1, 1), layout, cost.decision.axes))
                if tie in seen:
                    duplicate += elements
                    frozen += 0 if node.meta.requires_grad else elements
                elif tie in holders and node.meta.requires_grad:
                    crossing += elements
                seen.add(tie)
                holders[tie] = 1
            row.append((duplicate, frozen))
        shared.append(row)
    return shared, crossing


def block_time(context: Context, cost: BlockCost, shared: Shared, root: bool, weight_s: float) -> BlockTime:
    """A block as the data axis sees it."""
    return BlockTime(
        cost.forward_s,
        cost.backward_s,
        cost.elements - shared[0],
        root,
        weight_s,
        cost.frozen - shared[1],
        not context.model.kinds[cost.kind].passes_gradient,
        cost.hosted / context.cluster.device.host_bandwidth if cost.hosted else 0.0,
        cost.expert,
        cost.gathered,
    )


def assess(
    context: Context,
    config: Config,
    stages: Sequence[Sequence[BlockCost]],
    boundary: int,
    fitting: bool = False,
    beat: float = float("inf"),
) -> Assessment:
    """Price and simulate a plan's stages. Those that do not fit, if they have to (``fitting``), or take ``beat``
    seconds or more, are looked into no further, and take infinitely long."""
    begin = time.perf_counter()
    found = _assess(context, config, stages, boundary, fitting, beat)
    context.clock.add("simulation", begin)
    return found


def rank_bytes(context: Context, config: Config, stages: Sequence[Sequence[BlockCost]], boundary: int) -> list[int]:
    """Bytes of every rank under such stages, whether they fit or not."""
    begin = time.perf_counter()
    counted = _counted(context, config, stages, boundary)
    found = _with_bytes(context, counted, counted.bare, fitting=False)
    context.clock.add("simulation", begin)
    assert found is not None
    return found.rank_bytes()


def _assess(
    context: Context,
    config: Config,
    stages: Sequence[Sequence[BlockCost]],
    boundary: int,
    fitting: bool,
    beat: float,
) -> Assessment:
    counted = _counted(context, config, stages, boundary)
    one = counted.bare
    # What there is to beat is mostly missed by seconds, else bytes are sooner counted.
    if beat < float("inf"):
        one = _with_seconds(context, counted, one)
        if one.step_time >= beat:
            return counted.bare
    fits = _with_bytes(context, counted, one, fitting)
    if fits is None:
        return counted.bare
    return fits if beat < float("inf") else _with_seconds(context, counted, fits)


class _Counted(NamedTuple):
    """Of a plan's stages, what each data rank does with each block and keeps of it; elements whose gradients stages
    must add up (``crossing``); and the assessment, seconds and bytes left open."""

    place: Placed
    crossing: int
    blocks: list[list[BlockBytes]]
    bare: Assessment


def _counted(context: Context, config: Config, stages: Sequence[Sequence[BlockCost]], boundary: int) -> _Counted:
    place = placed(context, config, boundary)
    shared, crossing = tied_elements(context, stages)
    ends = list(accumulate(len(costs) for costs in stages))
    roots = [root_blocks(context.model, range(end - len(costs), end)) for costs, end in zip(stages, ends, strict=True)]
    kinds = context.padded(config.pad_heads).model.kinds

    def tail(cost: BlockCost) -> int:
        return tail_elements(kinds[cost.kind], cost.decision)

    # Equal stages take the same.
    known: dict[Any, tuple[DataTimes, list[BlockBytes]]] = {}
    found = []
    for costs, doubles, rooted in zip(stages, shared, roots, strict=True):
        key = (tuple(map(id, costs)), tuple(doubles), rooted)
        if key not in known:
            row = list(zip(costs, doubles, rooted, (halves(context, config, c) for c in costs), strict=True))
            timed = [block_time(context, c, double, root, half[0]) for c, double, root, half in row]
            held = [
                BlockBytes(
                    c.elements,
                    c.inflight,
                    c.transient,
                    double,
                    root,
                    half[1],
                    c.frozen,
                    still,
                    tail(c),
                    c.hosted,
                    c.expert,
                    c.gathered,
                )
                for c, (double, still), root, half in row
            ]
            known[key] = place.data.stage(timed), held
        found.append(known[key])
    times, blocks = [times for times, _ in found], [held for _, held in found]
    never, rows = float("inf"), tuple(map(tuple, stages))
    bare = Assessment(config, rows, tuple(times), (), (), never, {}, boundary, never, never)
    return _Counted(place, crossing, blocks, bare)


def _with_bytes(context: Context, counted: _Counted, one: Assessment, fitting: bool) -> Assessment | None:
    """None if it is ``fitting`` that is sought, and it does not fit."""
    memory, blocks, peaks = counted.place.memory, counted.blocks, []
    for peak in memory.peaks(blocks):
        if fitting and peak.total + memory.reserve > context.cluster.device.memory_bytes + 1.0:
            return None
        peaks.append(peak)
    found = replace(one, memory=memory.ranks(blocks, peaks), host=memory.hosts(blocks))
    return found if not fitting or within_memory(context, found) else None


def _with_seconds(context: Context, counted: _Counted, one: Assessment) -> Assessment:
    config, place = one.config, counted.place
    exchanged = counted.crossing * context.job.master_bytes / place.memory.shards
    tied_s = context.collectives.seconds("send_recv", exchanged, config.pp, config.mesh.strides()["pp"])
    overhead_s = context.ops.stack.step_s
    step_time, breakdown = step(one.times, one.stages, config, place.transfers, tied_s, overhead_s)
    context.clock.counts["simulations"] += 1
    computing_s = config.micro_batches * sum(cost.computing_s for stage in one.stages for cost in stage)
    if config.offload != "state":  # else the optimizer runs on the host
        computing_s += sum(stage.optimizer_s for stage in one.times)
    computing_s /= config.pp
    sought_s = full_power_s(context.waiting, step_time, computing_s)
    return replace(one, step_time=step_time, breakdown=breakdown, computing_s=computing_s, sought_s=sought_s)


def full_power_s(waiting: float, step_time: float, computing_s: float) -> float:
    """Seconds at full power that draw as much as a step does (`computing`): all of it where ``waiting`` is 1."""
    return step_time if waiting == 1.0 else waiting * step_time + (1 - waiting) * computing_s


def step(
    times: Sequence[DataTimes],
    stages: Sequence[Sequence[BlockCost]],
    config: Config,
    transfer_s: Sequence[float],
    tied_s: float,
    overhead_s: float = 0.0,
) -> tuple[float, dict[str, float]]:
    """Step time, and where it goes on the rank that decides it (seconds that add up to the step time).

    The optimizer starts everywhere at once: clipping needs every stage's gradients. ``overhead_s``: what the stack
    does beside.
    """
    m, rule = config.micro_batches, SCHEDULES[config.schedule]
    owned = [[s for s in range(len(times)) if rule.rank_of(s, config.pp) == rank] for rank in range(config.pp)]
    events = stage_events(times, config.schedule, config.pp)
    timeline = simulate(events, m, transfer_s, config.schedule, config.vpp)
    optimizer = max(sum(times[s].optimizer_s for s in own) for own in owned)
    total = timeline.total + tied_s + optimizer + overhead_s
    last = max(range(config.pp), key=lambda rank: (timeline.ends[rank], -rank))
    mine = [times[s] for s in owned[last]]
    blocks = [block for s in owned[last] for block in stages[s]]
    again = sum(block.again_s for block in blocks)
    talk = sum(block.communication_s for block in blocks)
    copies = sum(block.copies_s for block in blocks)
    own = sum(block.forward_s + block.backward_s for block in blocks)
    last_s = [0.0 if t.reduces_s else t.last_s + t.reduce_s for t in mine]
    busy = sum(m * (t.forward_s + t.backward_s) + t.first_s + late for t, late in zip(mine, last_s, strict=True))
    exposed = timeline.exposed[last]
    return total, {
        "computation": m * (own - again - talk - copies),
        "recomputation": m * again,
        "model axis communication": m * talk,
        "host copies": m * copies,
        "data axis": busy - m * own + exposed,
        "pipeline wait": timeline.ends[last] - busy - exposed if config.pp > 1 else 0.0,
        "tied weights": tied_s,
        "optimizer": optimizer,
        **({"step overhead": overhead_s} if overhead_s else {}),
    }
