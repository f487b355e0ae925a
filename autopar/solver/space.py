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
from autopar.solver.axis_choices import check_axes
from autopar.solver.block_problem import feature_splits
from autopar.solver.capabilities import Chosen, executes, refusals, schedule_of
from autopar.solver.fix import Fix
from autopar.solver.work import flops


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
    def choice(self) -> Chosen:
        """What the capability table judges."""
        return Chosen(self.mesh, self.schedule, self.vpp, self.micro_batches, self.zero, self.fsdp, self.offload)

    def __str__(self) -> str:
        text = f"{self.mesh}, micro_batch={self.micro_batch}, zero={self.zero}"
        text += f", fsdp={self.fsdp}" if self.zero and self.fsdp != self.mesh.data else ""
        text += f", {self.schedule}" if self.schedule not in ("none", "1f1b") else ""
        text += f", heads padded to a multiple of {self.pad_heads}" if self.pad_heads > 1 else ""
        return text + (f", offload={self.offload}" if self.offload != "none" else "")


def configs(model: ModelGraph, job: Job, cluster: Cluster, fix: Fix) -> Iterator[Config]:
    """All that the capability table lets be executed, in a fixed order."""
    for config in wished(model, job, cluster, fix):
        if executes(judged(config, job, fix)):
            yield config


def judged(config: Config, job: Job, fix: Fix) -> Chosen:
    """A configuration with what the job and the fix say about its blocks, for the capability table."""
    recompute = frozenset(choice.partition("(")[0] for _, choice in fix.recompute)
    return replace(config.choice, recompute=recompute, dtype=job.dtype)


def wished(model: ModelGraph, job: Job, cluster: Cluster, fix: Fix) -> Iterator[Config]:
    """All that the fix asks for and the cluster has room for. A model axis stays inside a node unless it is fixed."""
    devices, node = cluster.devices, cluster.devices_per_node
    for pp in _divisors(devices):
        if fix.pp not in (None, pp) or pp * (fix.vpp or 1) > len(model.blocks):
            continue
        for tp in _divisors(devices // pp):
            inside = tp <= node and node % tp == 0
            if fix.tp not in (None, tp) or not (inside or fix.tp == tp):
                continue
            cp = fix.cp or 1
            paddings = (1, tp) if can_pad(model, tp) else (1,)
            if devices // pp // tp % cp:
                continue
            dp = devices // pp // tp // cp
            if fix.dp not in (None, dp) or job.global_batch % dp:
                continue
            for micro_batch in _divisors(job.global_batch // dp):
                count = job.global_batch // dp // micro_batch
                if fix.micro_batch not in (None, micro_batch):
                    continue
                for schedule, vpp in _schedules(pp, fix):
                    for (zero, fsdp), pad_heads in product(_levels(dp * cp, node // tp, fix), paddings):
                        yield Config(
                            pp=pp,
                            dp=dp,
                            tp=tp,
                            micro_batch=micro_batch,
                            micro_batches=count,
                            zero=zero,
                            fsdp=fsdp,
                            cp=cp,
                            schedule=schedule,
                            vpp=vpp,
                            offload="state" if fix.offload in ("state", "all") else "none",
                            tp_parts=fix.tp_parts,
                            pad_heads=pad_heads,
                        )


def _schedules(pp: int, fix: Fix) -> Iterator[tuple[str, int]]:
    """Schedules and stages on each rank."""
    vpp = fix.vpp
    if fix.stages:
        if len(fix.stages) % pp or vpp not in (None, len(fix.stages) // pp):
            return
        vpp = len(fix.stages) // pp
    wished = fix.schedule or (schedule_of(pp) if vpp in (None, 1) else "interleaved")
    fixed = SCHEDULES[wished].stages
    yield wished, vpp or (2 if fixed is None else fixed)


def _levels(data: int, inside: int, fix: Fix) -> Iterator[tuple[int, int]]:
    """ZeRO levels and shard-group sizes that differ on this many data ranks, ``inside`` of them in one node."""
    if data == 1:
        if fix.fsdp in (None, 1):
            yield fix.zero or 0, 1
        return
    for level in range(4) if fix.zero is None else (fix.zero,):
        groups: tuple[int, ...] = (1,) if level == 0 else (data, inside) if 1 < inside < data else (data,)
        if fix.fsdp is not None:
            groups = (fix.fsdp,) if (fix.fsdp == 1) == (level == 0) else ()
        yield from ((level, group) for group in groups if data % group == 0)


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
