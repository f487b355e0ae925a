"""What FSDP2 really does at each ZeRO level, with and without stages: collectives counted on four ranks.

The counts are the contract of the cost model (the table in runtime/sharding.py).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from plain_plans import plain_plan, small_llama
from test_frozen import adapters, frozen_embedding, frozen_layers

import autopar
from autopar.codegen.emit import emit
from autopar.codegen.prove import run_ranks
from autopar.models import model_graph
from autopar.plan import Plan, Run, Stage
from autopar.solver.search import search

pytestmark = pytest.mark.proof  # ranks of every level and group: minutes

LAYERS, MICRO_BATCHES = 4, 4

SCRIPT = """
import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autopar.codegen.loading import load_train

torch.set_num_threads(1)
class Counted(TorchDispatchMode):
    # Collectives of more than one number: FSDP2's, as no axis here has others.

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if operator.namespace == "c10d" and max(x.numel() for x in tensors) > 1:
            self.counts[operator._opname] += 1
        return operator(*args, **(kwargs or {}))


ids = torch.randint(0, 256, (32, 16), generator=torch.Generator().manual_seed(0))
for path in sorted(Path("cases").iterdir()):
    train = load_train(path)
    mesh, fsdp_mesh, device = train.launch.start(train.MESH, train.FSDP, "cpu")
    step = train.parallelize(mesh, fsdp_mesh, device)
    train.parameters.initialise(step.stage, train.module.init_parameter, 0)
    count = train.MICRO_BATCH * train.MICRO_BATCHES
    for _ in range(2):  # the first step also finds out what stages send each other
        with Counted() as counted:
            step.forward_backward({"input_ids": ids[:count], "labels": ids[:count]})
    sharded = all(set(weight.device_mesh.mesh_dim_names) & {"data", "shard"} for weight in step.stage.parameters())
    found = Path(f"{path.name}_rank{dist.get_rank()}.json")
    found.write_text(json.dumps({**counted.counts, "sharded": sharded}))
dist.barrier()
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Case:
    """A plan by hand."""

    mesh: str
    schedule: str
    zero: int
    fsdp: int
    gathered: tuple[int, ...] = ()

    def __str__(self) -> str:
        stays = f"_stay{'_'.join(map(str, self.gathered))}" if self.gathered else ""
        return f"{self.mesh}_{self.schedule}_zero{self.zero}_fsdp{self.fsdp}{stays}"


def cases() -> Iterator[Case]:
    for zero, fsdp in ((0, 1), (1, 4), (2, 4), (3, 4), (1, 2), (2, 2), (3, 2)):
        yield Case("dp4", "none", zero, fsdp)
    # Blocks 1 to 4 are layers; of two stages the first has 1 and 2.
    yield Case("dp4", "none", 3, 4, (2,))
    yield Case("dp4", "none", 3, 2, (1, 2, 3, 4))
    for schedule in ("gpipe", "1f1b"):
        yield Case("pp2dp2", schedule, 3, 2, (1, 3))
    for schedule in ("gpipe", "1f1b", "interleaved", "zbv", "dualpipev"):
        for zero, fsdp in ((0, 1), (1, 2), (2, 2), (3, 2)):
            if zero < 2 or schedule in ("gpipe", "1f1b", "interleaved"):
                yield Case("pp2dp2", schedule, zero, fsdp)


def cut(plan: Plan, stages: int) -> tuple[Stage, ...]:
    runs = [
        Run(i, i + 1, run.candidate) for stage in plan.stages for run in stage.runs for i in range(run.start, run.stop)
    ]
    edges = [len(runs) * place // stages for place in range(stages + 1)]
    return tuple(Stage(tuple(runs[start:stop]), 0.0, 0.0, 0.0, {}) for start, stop in itertools.pairwise(edges))


def staying(plan: Plan, blocks: tuple[int, ...]) -> Plan:
    """The plan, cut into single blocks, with these staying gathered."""
    candidates = {**plan.candidates}
    stages = []
    for stage in plan.stages:
        runs = []
        for run in stage.runs:
            name = run.candidate
            if run.start in blocks:
                name = f"{run.candidate}/gathered"
                candidates[name] = replace(plan.candidates[run.candidate], name=name, gathered=True)
            runs.append(replace(run, candidate=name))
        stages.append(replace(stage, runs=tuple(runs)))
    return replace(plan, candidates=candidates, stages=tuple(stages))


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """By case and rank, calls of each collective in a step."""
    root = tmp_path_factory.mktemp("zero")
    (root / "cases").mkdir()
    model = small_llama()
    graph = model_graph(model)
    cluster = autopar.Cluster.parse("1x4:cpu")
    plans = {}
    for name, sizes in (("dp4", {"dp": 4, "pp": 1}), ("pp2dp2", {"dp": 2, "pp": 2})):
        job = autopar.Job(global_batch=sizes["dp"] * MICRO_BATCHES, seq_len=16, dtype="fp32")
        fix = {**sizes, "tp": 1, "zero": 0, "recompute": "none", "micro_batch": 1}
        plans[name] = search(graph, job, cluster, fix)
    for case in cases():
        vpp = 1 if case.schedule in ("none", "gpipe", "1f1b") else 2
        plan = plans[case.mesh]
        plan = replace(plan, schedule=case.schedule, vpp=vpp, zero=case.zero, fsdp=case.fsdp)
        plan = staying(replace(plan, stages=cut(plan, plan.mesh.pp * vpp)), case.gathered)
        emit(plan, graph, root / "cases" / str(case))
    for name, make in (("embedding", frozen_embedding), ("layers", frozen_layers), ("adapters", adapters)):
        part = model_graph(make())
        for mesh, (pp, dp) in (("dp4", (1, 4)), ("pp2dp2", (2, 2))):
            job = autopar.Job(global_batch=dp * MICRO_BATCHES, seq_len=16, dtype="fp32")
            plan = replace(plain_plan(part, pp, dp, 3, micro_batches=MICRO_BATCHES, job=job), fsdp=dp)
            if pp == 2:  # the embedding alone
                runs = tuple(run for stage in plan.stages for run in stage.runs)
                plan = replace(plan, stages=tuple(Stage(own, 0.0, 0.0, 0.0, {}) for own in (runs[:1], runs[1:])))
            emit(plan, part, root / "cases" / f"frozen_{name}_{mesh}")
    (root / "script.py").write_text(SCRIPT)
    run_ranks(["script.py"], 4, 900, folder=root)
    return {str(path.stem): json.loads(path.read_text()) for path in root.glob("*_rank*.json")}


def expected(case: Case) -> dict[str, int]:
    """Gathers, reductions and all-reduces of rank 0, by the table."""
    m, replicas = MICRO_BATCHES, (4 if case.mesh == "dp4" else 2) // case.fsdp
    # A group for each layer, and one for what is in none: embedding or head. Of four stages (embedding, two layers,
    # one, one and the head) rank 0 has the first and the third, or under a V the first and the last.
    layers = {"none": 4, "gpipe": 2, "1f1b": 2}.get(case.schedule, 1)
    ends = 2 if case.schedule in ("zbv", "dualpipev") else 1
    groups = layers + ends
    found = {}
    if case.fsdp > 1:
        once = sum(block <= layers for block in case.gathered)  # rank 0 has the first layers
        found["_allgather_base_"] = 2 * m * (layers - once) + once + m * ends if case.zero == 3 else groups
        found["_reduce_scatter_base_"] = groups * (m if case.zero >= 2 else 1)
    if replicas > 1:
        found["allreduce_"] = groups
    return found


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_collectives_are_those_of_the_table(counted: dict[str, dict[str, int]], case: Case) -> None:
    found = counted[f"{case}_rank0"]
    names = ("_allgather_base_", "_reduce_scatter_base_", "allreduce_")
    assert {name: found[name] for name in names if name in found} == expected(case)
    assert found["sharded"]


@pytest.mark.parametrize(("name", "still"), [("embedding", 0), ("layers", 2), ("adapters", 0)])
def test_blocks_that_no_gradient_passes_are_gathered_once(
    counted: dict[str, dict[str, int]], name: str, still: int
) -> None:
    """Adapters in all layers are as if all trained; behind frozen layers on other stages nothing comes either."""
    m = MICRO_BATCHES
    assert counted[f"frozen_{name}_dp4_rank0"]["_allgather_base_"] == 2 * m * LAYERS - m * still + m
    assert counted[f"frozen_{name}_pp2dp2_rank3"]["_allgather_base_"] == 2 * m * LAYERS - m * still + m
    # The embedding alone: it is frozen, so no backward frees it before the step's end.
    assert counted[f"frozen_{name}_pp2dp2_rank0"]["_allgather_base_"] == 1
    frozen = {"embedding": 0, "layers": 2, "adapters": 0}[name]
    head = name != "adapters"
    assert counted[f"frozen_{name}_dp4_rank0"]["_reduce_scatter_base_"] == m * (LAYERS - frozen + head)
    graph = model_graph({"embedding": frozen_embedding, "layers": frozen_layers, "adapters": adapters}[name]())
    passing = [graph.kinds[block.kind].passes_gradient for block in graph.blocks]
    assert passing == [False] * (1 + still) + [True] * (LAYERS - still + 1)
