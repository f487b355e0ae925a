"""The space searched: every mesh, micro-batch and ZeRO level that the capability table and the fix allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autopar.cluster import Cluster
from autopar.errors import BadInputError
from autopar.graph.ir import ModelGraph
from autopar.graph.size import size_at
from autopar.job import Job
from autopar.plan import Mesh
from autopar.sharding.rules import strategies_of
from autopar.solver.block_problem import feature_splits
from autopar.solver.capabilities import schedule_allows, schedule_of
from autopar.solver.fix import Fix
from autopar.solver.work import flops


@dataclass(frozen=True, slots=True, order=True)
class Config:
    """One point of the outer search; what is inside the blocks and stages is decided by the ILPs."""

    pp: int
    dp: int
    tp: int
    micro_batch: int
    micro_batches: int
    zero: int

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.pp, self.dp, self.tp)

    @property
    def schedule(self) -> str:
        return schedule_of(self.pp)

    def __str__(self) -> str:
        return f"{self.mesh}, micro_batch={self.micro_batch}, zero={self.zero}"


def configs(model: ModelGraph, job: Job, cluster: Cluster, fix: Fix) -> Iterator[Config]:
    """All of them, in a fixed order. A model axis stays inside a node unless ``tp`` is fixed."""
    devices = cluster.devices
    for pp in _divisors(devices):
        if pp > len(model.blocks) or fix.pp not in (None, pp):
            continue
        if fix.schedule not in (None, schedule_of(pp)):
            continue
        for tp in _divisors(devices // pp):
            inside = tp <= cluster.devices_per_node and cluster.devices_per_node % tp == 0
            if fix.tp not in (None, tp) or not (inside or fix.tp == tp):
                continue
            dp = devices // pp // tp
            if fix.dp not in (None, dp) or job.global_batch % dp:
                continue
            for micro_batch in _divisors(job.global_batch // dp):
                count = job.global_batch // dp // micro_batch
                if fix.micro_batch not in (None, micro_batch) or not schedule_allows(pp, count):
                    continue
                for zero in _levels(dp, fix):
                    yield Config(pp, dp, tp, micro_batch, count, zero)


def _levels(dp: int, fix: Fix) -> tuple[int, ...]:
    """ZeRO levels that differ on this many data ranks and agree with the fix."""
    if fix.fsdp is not None and fix.fsdp not in (1, dp):
        return ()
    wanted = fix.zero
    if fix.fsdp is not None and dp > 1:
        wanted = 0 if fix.fsdp == 1 else 3
    if dp == 1:
        return (wanted if wanted is not None else 0,)
    return (0, 3) if wanted is None else (wanted,)


def _divisors(n: int) -> list[int]:
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def check_space(model: ModelGraph, job: Job, cluster: Cluster, fix: Fix) -> None:
    """Why no configuration exists at all, said clearly. Raises BadInputError."""
    devices = cluster.devices
    if fix.tp is not None and fix.tp > 1:
        _check_model_axis(model, job, fix.tp, bool(fix.sp))
    if model.max_seq is not None and job.seq_len > model.max_seq:
        raise BadInputError(
            f"job: seq_len {job.seq_len} is longer than {model.name} takes ({model.max_seq}); lower seq_len"
        )
    if any(True for _ in configs(model, job, cluster, fix)):
        return
    pp, tp = fix.pp or 1, fix.tp or 1
    dps = [fix.dp] if fix.dp else [dp for dp in _divisors(devices) if devices % (dp * pp * tp) == 0]
    batch = job.global_batch
    if not any(batch % dp == 0 for dp in dps):
        told = f"dp={dps[0]}" if len(dps) == 1 else f"any dp that {fix.given() or 'the cluster'} leaves ({dps})"
        raise BadInputError(f"job: global_batch {batch} does not divide by {told}; choose another batch or mesh")
    if fix.micro_batch and all(batch % (dp * fix.micro_batch) for dp in dps):
        raise BadInputError(
            f"fix: micro_batch={fix.micro_batch} does not divide global_batch {batch} over dp in {dps}; "
            "choose a divisor of global_batch / dp"
        )
    if fix.fsdp is not None and fix.fsdp not in (1, *dps):
        raise BadInputError(f"fix: fsdp={fix.fsdp} is not the number of data ranks ({dps}); use fsdp=1 or fsdp=dp")
    fixed = ", ".join(f"{key}={value}" for key, value in fix.given().items())
    dp = min(dp for dp in dps if batch % dp == 0)
    least = fix.micro_batch or 1
    if fix.pp is not None and batch // (dp * least) < pp:
        raise BadInputError(
            f"fix: nothing can run {fixed} on {devices} devices with global_batch {batch}: 1F1B needs at least pp "
            f"micro-batches on each data rank, but pp={pp} and dp={dp} leave {batch // (dp * least)} of {least} "
            "samples; use fewer stages, a smaller micro_batch or a larger global_batch"
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
