"""A tiny model, its job and clusters, for tests that ask why a plan is as it is."""

from __future__ import annotations

import dataclasses

from dense_decoder import decoder

from autopar.cluster import Cluster
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.plan import Plan
from autopar.solver.search import search

JOB = Job(global_batch=8, seq_len=64)
NODE = Cluster.parse("1x8:h100")
PAIR = Cluster.parse("1x2:h100")
SPLIT = {"mesh": "pp=1,dp=1,tp=8", "micro_batch": 1, "recompute": "none"}


def small() -> ModelGraph:
    return decoder(2)


def split_plan() -> Plan:
    """Eight ranks split every operator of a model with 8 heads and 4 kv heads."""
    return search(small(), JOB, NODE, SPLIT)


def holding(cluster: Cluster, nbytes: int) -> Cluster:
    """The cluster with other memory and nothing else changed."""
    device = dataclasses.replace(cluster.device, memory_bytes=nbytes)
    return Cluster(tuple(dataclasses.replace(group, device=device) for group in cluster.groups))
