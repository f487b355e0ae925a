"""The space searched: every mesh, micro-batch and ZeRO level that the capability table and the fix allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from autopar.cluster import Cluster
from autopar.errors import BadInputError
from autopar.graph.ir import ModelGraph
from autopar.graph.padding import can_pad
from autopar.graph.size import size_at
from autopar.job import Job
from autopar.plan import Mesh
from autopar.schedule import SCHEDULES
from autopar.sharding.rules import strategies_of
from autopar.solver.axis_choices import check_axes, splits_sequences
from autopar.solver.block_problem import feature_splits
from autopar.solver.capabilities import Chosen, executes, refusals
from autopar.solver.fix import Fix
from autopar.solver.work import flops

LEAST_POSITIONS = 1024
"""Positions that a context axis leaves each rank at least, unless it is fixed."""

MOST_TOKENS = 2**17
"""Tokens of a micro-batch at most, unless it is fixed or a single sample has more."""

LAPS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Stages on each rank that are tried under schedules that take any number."""

SEARCHED_SCHEDULES = ("1f1b", "gpipe", "interleaved", "zbv", "dualpipev")


@dataclass(frozen=True, slots=True, order=True)
class Config:
    """One point of the outer search; what is inside the blocks and stages is decided by the ILPs.

    ``fsdp``: shard-group size over the dp x cp data ranks; ``vpp``: stages on each pipeline rank; ``offload``: "none"
    or "state"; ``pad_heads``: see `Plan`."""

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

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.pp, self.dp, self.cp, self.tp, self.tp_parts)

    @property
    def stages(self) -> int:
        return self.pp * self.vpp

    @property
    def sharding(self) -> tuple[tuple[tuple[str, int], ...], int, int]:
        """What shardings of blocks depend on: the model axes, samples per micro-batch, and padding of heads."""
        return tuple(self.mesh.model_axes().items()), self.micro_batch, self.pad_heads

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
    """What is decided first of a configuration: the sizes of the axes and micro-batches, and the padding of heads."""

    pp: int
    dp: int
    tp: int
    cp: int
    micro_batch: int
    micro_batches: int
    tp_parts: tuple[int, ...] = ()
    pad_heads: int = 1

    @property
    def sharding(self) -> tuple[tuple[tuple[str, int], ...], int, int]:
        """`Config.sharding` of all its configurations."""
        return tuple(Mesh(1, 1, self.cp, self.tp, self.tp_parts).model_axes().items()), self.micro_batch, self.pad_heads

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


def configs(model: ModelGraph, job: Job, cluster: Cluster, fix: Fix) -> Iterator[Config]:
    """All that the capability table lets be executed, in a fixed order."""
    for shape in shapes(model, job, cluster, fix):
        yield from configs_of(shape, job, cluster, fix)


def configs_of(shape: Shape, job: Job, cluster: Cluster, fix: Fix) -> Iterator[Config]:
    """Of these, the ones of a shape."""
    return (config for config in _wished_of(shape, cluster, fix) if executes(judged(config, job, fix)))


def judged(config: Config, job: Job, fix: Fix) -> Chosen:
    """A configuration with what the job and the fix say about its blocks, for the capability table."""
    recompute = frozenset(choice.partition("(")[0] for _, choice in fix.recompute)
    return replace(config.choice, recompute=recompute, dtype=job.dtype)


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
    for pp in _divisors(devices):
        if fix.pp not in (None, pp) or pp * (fix.vpp or 1) > len(model.blocks):
            continue
        for tp in _divisors(devices // pp):
            inside = tp <= node and node % tp == 0
            if fix.tp not in (None, tp) or not (inside or fix.tp == tp):
                continue
            paddings = (1, tp) if can_pad(model, tp) else (1,)
            for cp in _contexts(model, job, devices // pp // tp, tp, fix):
                dp = devices // pp // tp // cp
                if fix.dp not in (None, dp) or job.global_batch % dp:
                    continue
                for micro_batch in _divisors(job.global_batch // dp):
                    small = micro_batch == 1 or micro_batch * job.seq_len <= MOST_TOKENS
                    if fix.micro_batch == micro_batch or (fix.micro_batch is None and small):
                        count = job.global_batch // dp // micro_batch
                        for pad_heads in paddings:
                            yield Outline(pp, dp, tp, cp, micro_batch, count, fix.tp_parts, pad_heads)


def _contexts(model: ModelGraph, job: Job, ranks: int, tp: int, fix: Fix) -> list[int]:
    """Sizes of the context axis: the fixed one; else those that leave each rank `LEAST_POSITIONS` or more."""
    if fix.cp is not None:
        return [fix.cp] if ranks % fix.cp == 0 else []
    most = job.seq_len // LEAST_POSITIONS
    found = [1]
    for cp in _divisors(ranks)[1:]:
        if cp <= most and job.seq_len % cp == 0 and splits_sequences(model, {"cp": cp, "tp": tp}, job.seq_len, fix.sp):
            found.append(cp)
    return found


def _wished_of(shape: Shape, cluster: Cluster, fix: Fix) -> Iterator[Config]:
    outline = shape.outline
    data, inside = outline.dp * outline.cp, max(1, cluster.devices_per_node // outline.tp)
    for (zero, fsdp), offload in product(_levels(data, inside, outline.cp, fix), offloads(cluster, fix)):
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
        )


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
        nested = [n for n in _divisors(data) if n % inside == 0 or inside % n == 0 or n == data]
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


def _divisors(n: int) -> list[int]:
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def check_space(model: ModelGraph, job: Job, cluster: Cluster, fix: Fix) -> None:
    """Why no configuration exists at all, said clearly. Raises BadInputError."""
    devices = cluster.devices
    if fix.cp is not None and fix.cp > 1:
        check_axes(model, {"cp": fix.cp, "tp": fix.tp or 1}, job.seq_len, fix.sp)
    if fix.tp is not None and fix.tp > 1:
        _check_model_axis(model, job, fix.tp, bool(fix.sp))
    if model.max_seq is not None and job.seq_len > model.max_seq:
        raise BadInputError(
            f"job: seq_len {job.seq_len} is longer than {model.name} takes ({model.max_seq}); lower seq_len"
        )
    if any(True for _ in configs(model, job, cluster, fix)):
        return
    pp, tp = fix.pp or 1, fix.tp or 1
    dps = [fix.dp] if fix.dp else [dp for dp in _divisors(devices) if devices % (dp * pp * tp * (fix.cp or 1)) == 0]
    batch = job.global_batch
    if not any(batch % dp == 0 for dp in dps):
        told = f"dp={dps[0]}" if len(dps) == 1 else f"any dp that {fix.given() or 'the cluster'} leaves ({dps})"
        raise BadInputError(f"job: global_batch {batch} does not divide by {told}; choose another batch or mesh")
    if fix.micro_batch and all(batch % (dp * fix.micro_batch) for dp in dps):
        raise BadInputError(
            f"fix: micro_batch={fix.micro_batch} does not divide global_batch {batch} over dp in {dps}; "
            "choose a divisor of global_batch / dp"
        )
    cp = fix.cp or 1
    if fix.fsdp is not None and all(dp * cp % fix.fsdp for dp in dps):
        raise BadInputError(
            f"fix: fsdp={fix.fsdp} does not divide the number of data ranks ({[dp * cp for dp in dps]})"
        )
    fixed = ", ".join(f"{key}={value}" for key, value in fix.given().items())
    refused = Counter(
        limit for config in wished(model, job, cluster, fix) for limit in refusals(judged(config, job, fix))
    )
    if refused and fixed:
        limit = refused.most_common(1)[0][0]
        raise BadInputError(
            f"fix: nothing can run {fixed} on {devices} devices with global_batch {batch}: {limit.reason}"
            + (f" (otherwise {limit.avoids})" if limit.avoids else "")
        )
    raise BadInputError(
        f"job: global_batch {batch} fits no mesh of {devices} devices{f' with {fixed}' if fixed else ''}: dp must "
        f"divide it, tp stays inside a node of {cluster.devices_per_node} unless it is fixed, and pp takes what is "
        f"left, with at most {len(model.blocks)} stages and as many micro-batches on each data rank; choose a global "
        f"batch that is a multiple of {devices}, or fewer devices"
    )


def _check_model_axis(model: ModelGraph, job: Job, size: int, sequence: bool) -> None:
    """Refuse a ``tp`` that splits nothing, and ``sp`` on sequences that do not divide."""
    if sequence and job.seq_len % size:
        raise BadInputError(
            f"fix: sp=true splits sequences over tp={size}, but seq_len {job.seq_len} does not divide by it; use "
            "sp=false or another tp or seq_len"
        )
    for kind in model.kinds.values():
        for node in kind.graph.of("op"):
            splits = feature_splits(node, strategies_of(node, kind.graph))
            if any(size_at(split.extent or 0, 1, 1) % size == 0 for split in splits):
                return
    raise BadInputError(f"fix: tp={size} divides no feature dimension of any matmul of {model.name}; choose another tp")


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
