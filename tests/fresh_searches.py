"""Small searches that differ in model, device, links, mesh, dtype, shape, optimizer and fix, to be made in any order.

As a program: prints what each finds when it is the first search of its process. ``python -m fresh_searches`` forks a
process for each; ``python -m fresh_searches 3`` makes the fourth itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from dense_decoder import decoder
from tiny_models import chain

from autopar.cluster import Cluster
from autopar.errors import InfeasibleError
from autopar.graph.ir import ModelGraph
from autopar.job import Job
from autopar.solver.search import search

MODELS = {
    "chain": lambda: chain((32, 32), 16, 64),
    "wider": lambda: chain((32, 32), 32, 64),  # of the same names as the one before
    "mixed": lambda: chain((16, 64, 16), 16, 96),
    "tied": lambda: chain((32, 32), 16, 64, tied=True),
    "frozen": lambda: chain((32, 32), 16, 64, frozen=True),
    "decoder": lambda: decoder(1, heads=2, kv_heads=1, head=8, hidden=16, ffn=32, vocab=64),
}


def cluster(shape: str, memory: int = 0, slower: float = 1.0) -> Cluster:
    """``memory``: bytes in place of the catalog's, nothing reserved; ``slower``: how much slower its links are."""
    found = Cluster.parse(shape)
    inside, between = (
        dataclasses.replace(link, bandwidth=link.bandwidth / slower) for link in (found.intra_node, found.inter_node)
    )
    device = found.device
    if memory:
        device = dataclasses.replace(device, memory_bytes=memory, reserve_bytes=0)
    return Cluster((dataclasses.replace(found.groups[0], device=device, intra_node=inside, inter_node=between),))


Case = tuple[str, tuple[Any, ...], tuple[Any, ...], Mapping[str, Any]]
"""Model, cluster, job, fix."""

H100, A100 = ("1x2:h100",), ("1x2:a100-80g",)
JOB = (4, 32)
ONE = {"tp": 1}
CASES: tuple[Case, ...] = (
    ("chain", H100, JOB, ONE),
    ("chain", A100, JOB, ONE),
    ("chain", ("2x1:h100",), JOB, ONE),
    ("chain", ("1x4:h100",), JOB, ONE),
    ("chain", ("1x2:h100", 0, 1e4), JOB, ONE),
    ("chain", ("1x2:h100", 60_000), JOB, ONE),
    ("chain", ("1x2:h100", 100_000), JOB, ONE),
    ("chain", H100, (4, 32, "fp32"), ONE),
    ("chain", H100, (4, 32, "bf16", "sgd"), ONE),
    ("chain", H100, (4, 64), ONE),
    ("chain", H100, (8, 32), ONE),
    ("chain", H100, JOB, {"pp": 2, "schedule": "1f1b"}),
    ("chain", H100, JOB, {"pp": 2, "schedule": "gpipe"}),
    ("chain", H100, JOB, {"pp": 2, "schedule": "zbv"}),
    ("chain", H100, JOB, {"pp": 2, "vpp": 2, "schedule": "interleaved"}),
    ("chain", H100, JOB, {"tp": 2}),
    ("chain", H100, (4, 32, "fp32"), {"tp": 2}),
    ("chain", H100, (4, 64), {"tp": 2, "recompute": "full"}),
    ("wider", H100, JOB, ONE),
    ("wider", H100, JOB, {"tp": 2}),
    ("mixed", ("1x2:h100", 160_000), JOB, ONE),
    ("tied", H100, JOB, ONE),
    ("frozen", H100, JOB, ONE),
    ("decoder", ("1x4:h100",), JOB, {"tp": 4, "micro_batch": 2}),
    ("decoder", H100, JOB, ONE),
)


def found(place: int, models: Mapping[str, ModelGraph] | None = None) -> str:
    """What the search of case ``place`` finds, as a digest of all but the seconds it took. ``models``: graphs to use
    again; else it is built anew."""
    name, shape, job, fix = CASES[place]
    model = MODELS[name]() if models is None else models[name]
    try:
        plan = search(model, Job(*job), cluster(*shape), fix)
    except InfeasibleError as error:
        return f"nothing: {error}"
    told = {key: value for key, value in plan.to_json().items() if key != "seconds"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    return f"{plan.predicted.step_time!r} {plan.bound!r} {digest}"


def alone(place: int) -> str:
    """What a fork of this process finds."""
    end, start = os.pipe()
    child = os.fork()
    if not child:
        os.write(start, found(place).encode())
        os._exit(0)
    os.close(start)
    with os.fdopen(end) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, f"case {place} failed"
    return text


if __name__ == "__main__":
    # What torch imports when first needed, once for all forks.
    import_module("torch.fx.experimental.symbolic_shapes")
    wished = [int(text) for text in sys.argv[1:]]
    print(json.dumps([found(place) for place in wished] if wished else [alone(n) for n in range(len(CASES))]))
