"""Why a search has nothing to look at, said before it begins."""

from __future__ import annotations

from collections import Counter

from autopar.cluster import Cluster
from autopar.errors import BadInputError
from autopar.graph.ir import ModelGraph
from autopar.graph.size import size_at
from autopar.job import Job
from autopar.sharding.rules import strategies_of
from autopar.solver.axis_choices import check_axes
from autopar.solver.block_problem import feature_splits
from autopar.solver.capabilities import refusals
from autopar.solver.fix import Fix
from autopar.solver.space import configs, divisors, judged, wished


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
    if job.seq_len < model.min_seq:
        raise BadInputError(
            f"job: for sequences shorter than {model.min_seq} {model.name} runs other code than was traced; raise "
            f"seq_len, or trace it with inputs of {job.seq_len} positions"
        )
    if any(True for _ in configs(model, job, cluster, fix)):
        return
    pp, tp = fix.pp or 1, fix.tp or 1
    dps = [fix.dp] if fix.dp else [dp for dp in divisors(devices) if devices % (dp * pp * tp * (fix.cp or 1)) == 0]
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
            splits = feature_splits(node, strategies_of(node, kind.graph), convolutions=True)
            if any(size_at(split.extent or 0, 1, 1) % size == 0 for split in splits):
                return
    raise BadInputError(f"fix: tp={size} divides no feature dimension of any matmul of {model.name}; choose another tp")
