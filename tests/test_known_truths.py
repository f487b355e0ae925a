"""What the field knows of good plans, asked of the whole search on catalog models and devices."""

from dataclasses import replace
from itertools import pairwise

import pytest

import autopar
from autopar import Cluster, InfeasibleError, Job, Plan


def with_memory(cluster: Cluster, nbytes: float) -> Cluster:
    device = replace(cluster.device, memory_bytes=int(nbytes))
    return Cluster(tuple(replace(group, device=device) for group in cluster.groups))


def slower(cluster: Cluster, intra: float = 1.0, inter: float = 1.0) -> Cluster:
    """The cluster with bandwidths divided."""
    links = cluster.intra_node, cluster.inter_node
    by = [replace(link, bandwidth=link.bandwidth / times) for link, times in zip(links, (intra, inter), strict=True)]
    return cluster.with_links(*by)


def recomputation(plan: Plan) -> float:
    """Its share of the step."""
    return plan.predicted.breakdown["recomputation"] / plan.predicted.step_time


def test_8b_on_one_fast_node_is_pure_fsdp():
    plan = autopar.search("llama3-8b", Job(16, 8192), Cluster.parse("1x8:h100"))
    assert (plan.mesh.pp, plan.mesh.cp, plan.mesh.tp, plan.mesh.dp) == (1, 1, 1, 8)
    assert plan.zero >= 1
    assert plan.fsdp == 8


def test_70b_on_slow_nodes_has_tensor_parallelism_inside_and_the_pipeline_across():
    """10 Gb/s between nodes: every stage is one node, and a stage needs tensor parallelism to fit."""
    cluster = slower(Cluster.parse("4x8:h100"), inter=40)
    fix = {"micro_batch": 1, "recompute": "none", "offload": "none", "cp": 1}
    plan = autopar.search("llama3-70b", Job(64, 4096), cluster, fix=fix, gap=0.05)
    assert plan.mesh.pp == cluster.nodes
    assert 1 < plan.mesh.tp <= cluster.devices_per_node
    assert plan.mesh.size // plan.mesh.pp == cluster.devices_per_node  # no data axis between nodes
    # Memory binds: the widest data axis in a node leaves no room for the model.
    with pytest.raises(InfeasibleError):
        autopar.search("llama3-70b", Job(64, 4096), cluster, fix={**fix, "pp": plan.mesh.pp, "tp": 1})


def test_context_parallelism_where_one_sequence_does_not_fit():
    """Two sequences of half a million tokens: the tensor axis of one node cannot hold one of them, two nodes can."""
    cluster, model = Cluster.parse("2x8:h100"), "llama3-8b"
    with pytest.raises(InfeasibleError):
        autopar.search(model, Job(2, 2**19), cluster, fix={"cp": 1})
    plan = autopar.search(model, Job(2, 2**19), cluster, gap=0.1)  # a proof of it is not what is asked
    assert plan.mesh.cp > 1


def test_tensor_parallelism_shrinks_as_the_links_of_a_node_slow_down():
    """A model that must be split to fit: over the tensor axis while links are fast, into stages where they are slow."""
    cluster = with_memory(Cluster.parse("1x8:h100"), 24e9)
    fix = {"micro_batch": 1, "recompute": "none", "offload": "none", "cp": 1}
    sizes = [
        autopar.search("llama3.2-1b", Job(32, 8192), slower(cluster, intra=times), fix=fix).mesh.tp
        for times in (1, 4, 16, 64)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1
    assert sizes[-1] == 1


def test_tensor_parallelism_across_nodes_loses_more_the_slower_the_links_between_them():
    cluster, job = Cluster.parse("2x8:h100"), Job(16, 8192)

    def seconds(times: float, tp: int) -> float:
        fix = {"tp": tp, "pp": 1, "micro_batch": 1}
        return autopar.search("llama3-8b", job, slower(cluster, inter=times), fix=fix).predicted.step_time

    lost = [seconds(times, 16) / seconds(times, 8) for times in (1, 4, 16)]
    assert lost == sorted(lost)
    assert lost[0] > 1  # even at the catalog's speed it does not pay
    plan = autopar.search("llama3-8b", job, slower(cluster, inter=16), fix={"micro_batch": 1, "recompute": "none"})
    assert plan.mesh.tp <= cluster.devices_per_node


def test_more_memory_removes_recomputation():
    fix = {"tp": 1, "pp": 1, "cp": 1, "zero": 2, "micro_batch": 1, "offload": "none"}
    plans = [
        autopar.search("llama3-8b", Job(16, 8192), with_memory(Cluster.parse("1x8:h100"), nbytes), fix=fix)
        for nbytes in (56e9, 64e9, 72e9, 80e9, 96e9, 120e9)
    ]
    shares = [recomputation(plan) for plan in plans]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.1
    assert shares[-1] == 0.0
    times = [plan.predicted.step_time for plan in plans]
    assert times == sorted(times, reverse=True)
    # What fits in less fits in more: no bound is above a plan found with less.
    assert all(more.bound <= less.predicted.step_time for less, more in pairwise(plans))
