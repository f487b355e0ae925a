"""The space searched: every mesh, micro-batch and ZeRO level that the capability table and the fix allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from autopar.cluster import Cluster
from autopar.graph.dispatch import sharing_sizes
from autopar.graph.ir import ModelGraph
from autopar.graph.padding import can_pad
from autopar.job import Job
from autopar.mesh import AXES, Mesh, same_ranks
from autopar.schedule import SCHEDULES
from autopar.solver.axis_choices import splits_sequences
from autopar.solver.capabilities import Chosen, executes
from autopar.solver.fix import Fix
from autopar.solver.rank_order import Order, inside, model_order, orders_of
from autopar.solver.work import flops

LEAST_POSITIONS = 1024
"""Positions that a context axis leaves each rank at least, unless it is fixed."""

MOST_TOKENS = 2**17
"""Tokens of a micro-batch at most, unless it is fixed or a single sample has more."""

LAPS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Stages on each rank that are tried under schedules that take any number."""

SEARCHED_SCHEDULES = ("1f1b", "gpipe", "interleaved", "zbv", "dualpipev")


OPEN: Order = ()
"""No order yet (`Config`)."""

Sharding = tuple[tuple[tuple[str, int], ...], int, int, tuple[int, ...], int]
"""The model axes with their sizes, samples per micro-batch, padding of heads, how far apart neighbours on each axis
are (nothing where the axes are the innermost), and the data ranks that share experts."""


@dataclass(frozen=True, slots=True, order=True)
class Config:
    """One point of the outer search; what is inside the blocks and stages is decided by the ILPs.

    ``fsdp``: shard-group size over the dp x cp data ranks; ``vpp``: stages on each pipeline rank; ``offload``: "none"
    or "state"; ``pad_heads``: see `Plan`; ``order``: of the mesh axes (`Mesh`). Where it is `OPEN`, seconds are the
    least of any order that is searched: such a configuration stands for all of these in bounds, and has no price."""

    pp: int
    dp: int
    tp: int
    micro_batch: int
    micro_batches: int
    zero: int
    fsdp: int = 1
    cp: int = 1
    schedule: str = "none"
    vpp: int = 1
    offload: str = "none"
    tp_parts: tuple[int, ...] = ()
    pad_heads: int = 1
    order: Order = AXES
    ep: int = 1

    @property
    def mesh(self) -> Mesh:
        return _mesh(self.pp, self.dp, self.cp, self.tp, self.tp_parts, self.order or AXES, self.ep)

    @property
    def stages(self) -> int:
        return self.pp * self.vpp

    @property
    def sharding(self) -> Sharding:
        """What shardings of blocks depend on."""
        return _sharding(self.mesh, self.micro_batch, self.pad_heads)

    @property
    def shape(self) -> Shape:
        """What is decided before the data ranks."""
        outline = Outline(
            self.pp,
            self.dp,
            self.tp,
            self.cp,
            self.micro_batch,
            self.micro_batches,
            self.tp_parts,
            self.pad_heads,
            model_order(self.order or AXES),
            self.ep,
        )
        return Shape(outline, self.schedule, self.vpp)

    @property
    def choice(self) -> Chosen:
        """What the capability table judges."""
        return Chosen(self.mesh, self.schedule, self.vpp, self.micro_batches, self.zero, self.fsdp, self.offload)

    def __str__(self) -> str:
        text = f"{self.mesh}, micro_batch={self.micro_batch}, zero={self.zero}"
        text += f", fsdp={self.fsdp}" if self.zero and self.fsdp != self.mesh.data else ""
        text += f", {self.schedule}" if self.schedule not in ("none", "1f1b") else ""
        text += f", heads padded to a multiple of {self.pad_heads}" if self.pad_heads > 1 else ""
        return text + (f", offload={self.offload}" if self.offload != "none" else "")


@dataclass(frozen=True, slots=True, order=True)
class Outline:
    """What is decided first of a configuration: the sizes of the axes and micro-batches, and the padding of heads.

    ``order``: as which the order of the mesh axes places the model axes (`model_order`); ``ep``: data ranks that share
    experts."""

    pp: int
    dp: int
    tp: int
    cp: int
    micro_batch: int
    micro_batches: int
    tp_parts: tuple[int, ...] = ()
    pad_heads: int = 1
    order: Order = AXES
    ep: int = 1

    @property
    def mesh(self) -> Mesh:
        return _mesh(self.pp, self.dp, self.cp, self.tp, self.tp_parts, self.order, self.ep)

    @property
    def sharding(self) -> Sharding:
        """`Config.sharding` of all its configurations."""
        return _sharding(self.mesh, self.micro_batch, self.pad_heads)

    @property
    def ranks(self) -> int:
        """Ranks that a block is sharded over."""
        return self.cp * self.tp


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """An outline under a schedule: what is decided next. Data ranks are still free to share state out or not."""

    outline: Outline
    schedule: str
    vpp: int


@dataclass(frozen=True, slots=True, order=True)
class Family:
    """A shape at one ZeRO level, its state on the device or not; shard groups are still free."""

    shape: Shape
    zero: int
    offload: str


@lru_cache(maxsize=4096)
def _mesh(pp: int, dp: int, cp: int, tp: int, tp_parts: tuple[int, ...], order: Order, ep: int) -> Mesh:
    """A mesh, which thousands of configurations ask for again and again."""
    return Mesh(pp, dp, cp, tp, tp_parts, order, ep)


@lru_cache(maxsize=4096)
def _sharding(mesh: Mesh, micro_batch: int, pad_heads: int) -> Sharding:
    axes, apart = mesh.model_axes(), tuple[int, ...]()
    if mesh.order != AXES:
        strides = [found.strides() for found in (mesh, replace(mesh, order=AXES))]
        if any(strides[0][axis] != strides[1][axis] for axis in axes):
            apart = tuple(strides[0][axis] for axis in axes)
    return tuple(axes.items()), micro_batch, pad_heads, apart, mesh.ep


def configs(model: ModelGraph, job: Job, cluster: Cluster, fix: Fix) -> Iterator[Config]:
    """All that the capability table lets be executed, in a fixed order."""
    for shape in shapes(model, job, cluster, fix):
        yield from configs_of(shape, job, cluster, fix)


def configs_of(shape: Shape, job: Job, cluster: Cluster, fix: Fix) -> Iterator[Config]:
    """Of these, the ones of a shape."""
    return (one for config in open_configs_of(shape, job, cluster, fix) for one in in_order(config, cluster))


def open_configs_of(shape: Shape, job: Job, cluster: Cluster, fix: Fix) -> Iterator[Config]:
    """The same, their order left `OPEN` where there is a choice."""
    return (config for config in _wished_of(shape, cluster, fix) if executes(judged(config, job, fix)))


def in_order(config: Config, cluster: Cluster) -> list[Config]:
    """The configurations that one with an open order stands for, the default order first; itself, if it has one."""
    return [config] if config.order else [replace(config, order=order) for order in orders_in(config, cluster)]


def orders_in(config: Config, cluster: Cluster) -> tuple[Order, ...]:
    """The orders that a configuration stands for."""
    if config.order:
        return (config.order,)
    return orders_of(config.pp, config.dp, config.cp * config.tp, cluster.devices_per_node)


def judged(config: Config, job: Job, fix: Fix) -> Chosen:
    """A configuration with what the job and the fix say about its blocks, for the capability table."""
    recompute = frozenset(choice.partition("(")[0] for _, choice in fix.recompute)
    mesh, schedule, count = config.mesh, config.schedule, config.micro_batches
    return Chosen(
        mesh, schedule, config.vpp, count, config.zero, config.fsdp, config.offload, recompute, dtype=job.dtype
    )


def wished(model: ModelGraph, job: Job, cluster: Cluster, fix: Fix) -> Iterator[Config]:
    """All that the fix asks for and the cluster has room for, executable or not."""
    for shape in shapes(model, job, cluster, fix):
        yield from _wished_of(shape, cluster, fix)


def shapes(model: ModelGraph, job: Job, cluster: Cluster, fix: Fix) -> Iterator[Shape]:
    """All sizes of axes and micro-batches under all schedules."""
    for outline in outlines(model, job, cluster, fix):
        for schedule, vpp in _schedules(outline.pp, len(model.blocks), fix):
            yield Shape(outline, schedule, vpp)


def outlines(model: ModelGraph, job: Job, cluster: Cluster, fix: Fix) -> Iterator[Outline]:
    """All sizes of axes and micro-batches. A tensor axis stays inside a node unless it is fixed."""
    devices, node = cluster.devices, cluster.devices_per_node
    sharing = (fix.ep,) if fix.ep else sharing_sizes(model)
    for pp in divisors(devices):
        if fix.pp not in (None, pp) or pp * (fix.vpp or 1) > len(model.blocks):
            continue
        for tp in divisors(devices // pp):
            inside = tp <= node and node % tp == 0
            if fix.tp not in (None, tp) or not (inside or fix.tp == tp):
                continue
            paddings = (1, tp) if can_pad(model, tp) else (1,)
            for cp in _contexts(model, job, devices // pp // tp, tp, fix):
                dp = devices // pp // tp // cp
                if fix.dp not in (None, dp) or job.global_batch % dp:
                    continue
                for micro_batch in divisors(job.global_batch // dp):
                    small = micro_batch == 1 or micro_batch * job.seq_len <= MOST_TOKENS
                    if fix.micro_batch == micro_batch or (fix.micro_batch is None and small):
                        count = job.global_batch // dp // micro_batch
                        order = model_order(_fixed_order(pp, dp, cp, tp, fix)) if fix.order else AXES
                        for pad_heads, ep in product(paddings, _sharing(sharing, dp * cp, tp, node)):
                            yield Outline(pp, dp, tp, cp, micro_batch, count, fix.tp_parts, pad_heads, order, ep)


def _sharing(sizes: Sequence[int], data: int, tp: int, node: int) -> list[int]:
    """Of these numbers of data ranks that may share experts, none, the most that fit in a node, and those that fill
    nodes; a single one is fixed."""
    there = [n for n in sizes if data % n == 0]
    near = max(1, node // tp)
    most = max((n for n in there if near % n == 0), default=1)
    return there if len(sizes) == 1 else [n for n in there if n in (1, most) or n % near == 0]


def _contexts(model: ModelGraph, job: Job, ranks: int, tp: int, fix: Fix) -> list[int]:
    """Sizes of the context axis: the fixed one; else those that leave each rank `LEAST_POSITIONS` or more."""
    if fix.cp is not None:
        return [fix.cp] if ranks % fix.cp == 0 else []
    most = job.seq_len // LEAST_POSITIONS
    found = [1]
    for cp in divisors(ranks)[1:]:
        if cp <= most and job.seq_len % cp == 0 and splits_sequences(model, {"cp": cp, "tp": tp}, job.seq_len, fix.sp):
            found.append(cp)
    return found


def _wished_of(shape: Shape, cluster: Cluster, fix: Fix) -> Iterator[Config]:
    outline, node, ep = shape.outline, cluster.devices_per_node, shape.outline.ep
    fixed = _fixed_order(outline.pp, outline.dp, outline.cp, outline.tp, fix)
    several = ep == 1 and not fixed and len(orders_of(outline.pp, outline.dp, outline.ranks, node)) > 1
    near = inside(replace(outline.mesh, order=fixed or AXES), node)
    levels = _levels(outline.dp * outline.cp, near, outline.cp, fix)
    for (zero, fsdp), offload in product(levels, offloads(cluster, fix)):
        yield Config(
            pp=outline.pp,
            dp=outline.dp,
            tp=outline.tp,
            micro_batch=outline.micro_batch,
            micro_batches=outline.micro_batches,
            zero=zero,
            fsdp=fsdp,
            cp=outline.cp,
            schedule=shape.schedule,
            vpp=shape.vpp,
            offload=offload,
            tp_parts=outline.tp_parts,
            pad_heads=outline.pad_heads,
            order=fixed or (OPEN if several else AXES),
            ep=ep,
        )


def _fixed_order(pp: int, dp: int, cp: int, tp: int, fix: Fix) -> Order:
    """The order that is fixed for a mesh of these sizes, or nothing."""
    return same_ranks(Mesh(pp, dp, cp, tp, (), fix.order)) if fix.order else ()


def _schedules(pp: int, blocks: int, fix: Fix) -> Iterator[tuple[str, int]]:
    """Schedules and stages on each rank."""
    vpp = fix.vpp
    if fix.stages:
        if len(fix.stages) % pp or vpp not in (None, len(fix.stages) // pp):
            return
        vpp = len(fix.stages) // pp
    if pp == 1:
        yield fix.schedule or "none", vpp or 1
        return
    for schedule in (fix.schedule,) if fix.schedule else SEARCHED_SCHEDULES:
        number = SCHEDULES[schedule].stages
        for laps in (vpp,) if vpp else (number,) if number else LAPS:
            if pp * laps <= blocks:
                yield schedule, laps


def _levels(data: int, inside: int, cp: int, fix: Fix) -> Iterator[tuple[int, int]]:
    """ZeRO levels and shard-group sizes that differ on this many data ranks, ``inside`` of them in one node."""
    if data == 1:
        if fix.fsdp in (None, 1):
            yield fix.zero or 0, 1
        return
    for level in range(4) if fix.zero is None else (fix.zero,):
        nested = [n for n in divisors(data) if n % inside == 0 or inside % n == 0 or n == data]
        groups = [n for n in nested if n > 1 and n % cp == 0]
        if level == 0:
            groups = [1]
        if fix.fsdp is not None:
            groups = [fix.fsdp] if (fix.fsdp == 1) == (level == 0) else []
        yield from ((level, group) for group in groups if data % group == 0)


def offloads(cluster: Cluster, fix: Fix) -> tuple[str, ...]:
    """Where the state waits."""
    if fix.offload is not None:
        return ("state",) if fix.offload in ("state", "all") else ("none",)
    device = cluster.device
    return ("none", "state") if device.host_bandwidth and device.host_memory_bandwidth else ("none",)


def divisors(n: int) -> list[int]:
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def model_flops(model: ModelGraph, job: Job) -> float:
    """Model FLOP of one step: forward, and twice that backward; recomputation does not count."""
    per_kind = {}
    for name, kind in model.kinds.items():
        metas = {node.name: node.meta.at(1, job.seq_len) for node in kind.graph.nodes.values()}
        per_kind[name] = sum(
            flops(node, [metas[operand] for operand in node.operands()], metas[node.name])
            for node in kind.graph.of("op")
        )
    return 3.0 * job.global_batch * sum(per_kind[block.kind] for block in model.blocks)
